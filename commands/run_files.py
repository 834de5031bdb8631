# SPDX-License-Identifier: Apache-2.0
"""The files that tell of a run beside what it makes: its trace and its page."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import RequestError
from .screen import Screen

__all__ = ["RunFiles"]


@dataclass(frozen=True)
class RunFiles:
    """What `run` is asked to write of how it went.

    Attributes:
        record: Where a trace (.npz) goes; None writes none.
        report: Where an HTML page goes, for which the request runs uncached as well; or None.
        tokens: Tokens of each frame in the trace; None records all.
        signals: Whether the trace has the hidden-sized signals too.
    """

    record: Path | None
    report: Path | None
    tokens: int | None
    signals: bool

    def check(self, out: Path) -> None:
        """Refuse places that can't be written, and what can't go together.

        Raises:
            RequestError: such a place, or both files at once.
            OutputError: a place that can't be written.
            ExtraError: the page's packages are not installed.
        """
        from ..core.extras import require_extra
        from ..core.output import check_file

        if self.report is not None:
            require_extra("report", "run --report")
        for flag, path in self.places().items():
            check_file(path, flag)
            if path == out:
                raise RequestError(f"{flag} '{path}'", "is --out's file too", "name another")
        if self.record is not None and self.report is not None:
            raise RequestError("--record", "can't be given with --report", "make two runs")
        if self.tokens is not None and self.tokens < 1:
            raise RequestError(f"--record-tokens {self.tokens}", "is below 1", "use 64")

    def check_bundle(self, bundle: Any) -> None:
        """Refuse a bundle of which no trace can be made.

        Raises:
            RequestError: a trace is wanted of a bundle with two transformers.
        """
        from ..runtime.pipeline.generate import check_recordable

        if self.record is not None:
            check_recordable(bundle)

    def places(self) -> dict[str, Path]:
        """Return flag → file of those that are asked for."""
        flags = {"--record": self.record, "--report": self.report}
        return {flag: path for flag, path in flags.items() if path is not None}

    def recorder(self, generator: Any, request: Any) -> Any:
        """Return what watches the run, or None; for a page, run a few steps with and without the cache.

        Neither of the page's two timed runs is then the first.
        """
        from ..tuning.bench import WARM_UP_STEPS
        from ..tuning.trace import TraceRecorder

        if self.report is not None:
            for each in (request, _uncached(request)):
                generator.generate(replace(each, steps=WARM_UP_STEPS))
            return _page_recorder(generator, request)
        return None if self.record is None else TraceRecorder(self.signals, self.tokens)

    def write(
        self, screen: Screen, generator: Any, request: Any, result: Any, recorder: Any
    ) -> Any:
        """Write the files; return the uncached run that was made for the page, or None."""
        if self.record is not None:
            recorder.trace().save(self.record)
        if self.report is None:
            return None
        from ..tuning.provenance import provenance
        from ..tuning.report import write_run_report

        uncached = _page_recorder(generator, request)
        reference = generator.generate(_uncached(request), recorder=uncached)
        write_run_report(
            self.report,
            prompt=request.prompt or "",
            result=result,
            reference=reference,
            recorder=recorder,
            uncached=uncached,
            setting=request.cache,
            parameters=result.parameters,
            provenance=provenance(
                generator.bundle,
                generator.transformer.session.model.backend.name,
                ["freewheel", *sys.argv[1:]],
            ),
        )
        screen.note(f"report: {self.report}")
        return reference


def _page_recorder(generator: Any, request: Any) -> Any:
    """Make what watches a run for its page; hidden-sized signals cost time, so only if looked at."""
    from ..tuning.run_recorder import RunRecorder

    policy = generator.bundle.manifest.policies.get(request.cache.policy)
    signals = policy.spec.signals if policy is not None else []
    looked_at = request.cache.signal or next(iter(signals), None)
    return RunRecorder(wants_signals=looked_at in ("modulated_input", "first_block_residual"))


def _uncached(request: Any) -> Any:
    from ..policies.setting import CacheSetting

    return replace(request, cache=CacheSetting())

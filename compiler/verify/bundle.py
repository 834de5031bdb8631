# SPDX-License-Identifier: Apache-2.0
"""Verify a bundle: its bytes, its engines against PyTorch, its policies against their laws.

Nothing of the engines is believed where a file has changed. Portable graphs are checked beside the
engines, through ONNX Runtime, since another machine compiles its engines from them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ...bundle.manifest import GraphEntry
from ...bundle.reader import Bundle
from ...core.errors import BuildError, MismatchError
from ...core.progress import Progress, Silent
from ...engines import backend as find_backend
from ...engines.base import Backend, Engine, Target
from ...engines.record import EngineRecord
from ...passes import backend_pipeline, run_passes
from ...runtime.model import DeviceOptions, Model
from ..cut.declared import Cut, Segment
from ..cut.document import cut_of
from ..graphs.caching import caching_of
from ..graphs.filters import filter_segments
from ..sequence.cut import cut_sequence
from .engines import (
    EngineCheck,
    Reference,
    Subject,
    Tensors,
    compare,
    interface_fault,
    sample_dims,
    sample_inputs,
)
from .policies import (
    SHAPES,
    CompiledDecide,
    PolicyCheck,
    check_policy,
    random_settings,
)

__all__ = ["VerifyReport", "verify_bundle"]

PORTABLE = "onnx"
REFERENCE_BACKEND = "onnxruntime"
CASES = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class VerifyReport:
    """What was found.

    Attributes:
        folder: The bundle.
        backend: Whose engines were verified.
        files: Files whose digests were compared.
        changed_files: Files that are not as the manifest says; nothing else was verified then.
        engines: Every output of every engine.
        policies: Every compiled policy.
        skipped: Graph → why it, or its portable form, was not compared.
    """

    folder: Path
    backend: str
    files: int
    changed_files: tuple[str, ...] = ()
    engines: tuple[EngineCheck, ...] = ()
    policies: tuple[PolicyCheck, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        checks: tuple[EngineCheck | PolicyCheck, ...] = (*self.engines, *self.policies)
        return not self.changed_files and all(c.ok for c in checks)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``verify --json`` prints."""
        return {
            "ok": self.ok,
            "backend": self.backend,
            "files": self.files,
            "changed_files": list(self.changed_files),
            "engines": [c.as_dict() for c in self.engines],
            "policies": [c.as_dict() for c in self.policies],
            "skipped": dict(self.skipped),
        }

    def rows(self) -> list[list[Any]]:
        """Return one row per output: graph, block, output, relative error, tolerance, ok."""
        engines = [
            [
                f"{c.graph} ({c.form})",
                c.block,
                c.output,
                _short(c.error),
                _short(c.tolerance),
                _word(c.ok),
            ]
            for c in self.engines
        ]
        policies = [
            [
                f"decide.{c.policy} ({c.form})",
                None,
                f"{c.decisions} decisions, {c.reused} reuses",
                _short(c.mix_error),
                _short(c.mix_tolerance),
                _word(c.ok),
            ]
            for c in self.policies
        ]
        return [*engines, *policies]

    def summary(self) -> str:
        """Say in a line what was verified and how it came out."""
        if self.changed_files:
            changed = len(self.changed_files)
            return f"{changed} of {self.files} files changed; engines were not verified"
        bad = sum(not c.ok for c in self.engines)
        wrong = sum(not c.ok for c in self.policies)
        decisions = sum(c.decisions for c in self.policies)
        ties = sum(c.ties for c in self.policies)
        return (
            f"{self.files} files unchanged; {len(self.engines) - bad} of {len(self.engines)} "
            f"outputs equal PyTorch ({self.backend}); {len(self.policies) - wrong} of "
            f"{len(self.policies)} compiled policies equal their laws "
            f"over {decisions} decisions ({ties} ties){self._left_out()}"
        )

    def _left_out(self) -> str:
        """Name the graphs that nothing was compared of: a reader must not take them for verified."""
        left = sorted(self.skipped.keys() - {c.graph for c in self.engines})
        return f"; NOT compared: {', '.join(left)}" if left else ""

    def raise_on_mismatch(self) -> None:
        """Raise where something differs.

        Raises:
            MismatchError: names the first file, output or policy that differs.
        """
        if self.changed_files:
            shown = ", ".join(f"'{n}'" for n in self.changed_files[:5])
            raise MismatchError(
                f"{self.folder}, file {shown}",
                f"{len(self.changed_files)} of {self.files} files differ from the SHA-256 "
                "in manifest.json",
                "copy the bundle again, or build it again with --force",
            )
        bad = [c for c in self.engines if not c.ok]
        if bad:
            worst = bad[0]
            block = "" if worst.block is None else f", block {worst.block}"
            error = "is not finite" if worst.error is None else f"differs by {worst.error:.1e}"
            found = f"{error} relative to PyTorch, {worst.tolerance:.0e} is allowed"
            raise MismatchError(
                f"{self.folder}, graph '{worst.graph}' ({worst.form}){block}, "
                f"output '{worst.output}'",
                f"{worst.fault or found}; "
                f"{len(self.engines) - len(bad)} of {len(self.engines)} outputs agree",
                "build the bundle again with --force; if that doesn't help, try another --backend",
            )
        wrong = [c for c in self.policies if not c.ok]
        if wrong:
            raise MismatchError(
                f"{self.folder}, graph 'decide.{wrong[0].policy}' ({wrong[0].form})",
                f"{wrong[0].faults[0]}; {len(wrong)} of {len(self.policies)} policies fail",
                "build the bundle again with --force, by the Freewheel that runs it",
            )


def verify_bundle(
    bundle: Bundle,
    backend: str | None = None,
    progress: Progress | None = None,
    *,
    options: DeviceOptions | None = None,
) -> VerifyReport:
    """Verify digests, then that every tensor is readable, then engines, then policies.

    Engines are verified with the weights of every expert, through the reader that `run` has.

    Args:
        bundle: An open bundle.
        backend: Whose engines; None takes the bundle's first.
        progress: Told of every file set, engine and policy.
        options: How engines are driven; None drives them plainly.

    Returns:
        The report; `VerifyReport.raise_on_mismatch` turns it into an error.

    Raises:
        BackendUnavailable: the bundle has no engines for the backend, or it can't run here.
        BundleError: an engine was compiled for another machine, or a tensor can't be read.
    """
    progress = progress or Silent()
    manifest = bundle.manifest
    progress.phase("digests", 1)
    changed = bundle.digests()
    progress.advance(f"{len(manifest.files)} files")
    name = backend or manifest.engines[0].backend
    if changed:
        return VerifyReport(bundle.folder, name, len(manifest.files), tuple(changed))
    for tensor in manifest.tensors:
        bundle.tensor(tensor)
    with _portable_engines(bundle) as portable:
        model = Model(bundle, backend, options)
        engines, skipped = check_engines(model, portable, progress)
        policies = check_policies(model, portable, progress)
        for expert in range(1, len(manifest.experts)):
            other = Model(bundle, backend, options, expert)
            engines += check_engines(other, portable, progress)[0]
    return VerifyReport(
        bundle.folder, name, len(manifest.files), (), tuple(engines), tuple(policies), skipped
    )


def check_engines(
    model: Model, portable: Callable[[str], Engine], progress: Progress
) -> tuple[list[EngineCheck], dict[str, str]]:
    """Compare every engine, and every portable graph that ONNX Runtime takes, with PyTorch.

    Of a second expert only graphs with weights are compared: the others are the first one's.

    Returns:
        The checks, and why portable graphs were left out.
    """
    manifest, cut = model.manifest, cut_of(model.bundle)
    segments = {s.name: s for s in (*cut.segments, *caching_of(cut), *filter_segments(cut))}
    parts: Mapping[str, int] = {}
    if manifest.sequence is not None:
        sequence = cut_sequence(cut)
        segments |= {s.name: s for s in sequence.segments}
        parts = sequence.example_dims
    prefix = model.prefix
    graphs = {
        n: g
        for n, g in manifest.graphs.items()
        if g.runs != "decide" and (g.weights or not model.expert)
    }
    built = model.bundle.engines(model.backend.name)
    assert built is not None, "Model found the engine set"
    checks: list[EngineCheck] = []
    skipped: dict[str, str] = {}
    progress.phase("engines", len(graphs))
    for name, graph in graphs.items():
        progress.advance(name)
        if name not in segments and graph.runs != "group":
            skipped[name] = f"has no PyTorch module in the family '{manifest.family}'"
            continue
        profile = _profile(model.bundle, built.files[name]) if name in built.files else {}
        ranges = _ranges(graph, profile)
        dims = [{**parts, **sample_dims(cut, case, ranges)} for case in range(CASES)]
        cases = [sample_inputs(graph, manifest, d, seed=case) for case, d in enumerate(dims)]
        for block, reference, taps in _references(model.bundle, cut, segments, name, prefix):
            if name in built.files:
                subject = Subject(
                    prefix + name,
                    model.backend.name,
                    block,
                    graph,
                    model.engine(name),
                    _binder(model, name, block),
                    reference,
                    model.device,
                    model.backend.synchronize,
                    partial(_case_of, dims),
                    taps,
                )
                checks += compare(subject, cases)
            reason = _not_portable(graph)
            if reason is not None:
                skipped[name] = reason
                continue
            try:
                engine = portable(name)
            except BuildError as error:
                skipped[name] = error.what
                continue
            bind = _portable_binder(model.bundle, engine, name, block, prefix)
            subject = Subject(
                prefix + name, PORTABLE, block, graph, engine, bind, reference,
                CPU, _nothing, partial(_case_of, dims), taps,
            )  # fmt: skip
            checks += compare(subject, cases)
    return checks, skipped


def _case_of(cases: Sequence[Mapping[str, int]], known: Mapping[str, int]) -> Mapping[str, int]:
    """Return all sizes of the case whose inputs have these: an output may have more of them."""
    return next(sizes for sizes in cases if known.items() <= sizes.items())


def check_policies(
    model: Model, portable: Callable[[str], Engine], progress: Progress
) -> list[PolicyCheck]:
    """Compare every compiled policy, engine and portable graph, with its Python law."""
    manifest, backend = model.manifest, model.backend
    built = model.bundle.engines(backend.name)
    assert built is not None, "Model found the engine set"
    progress.phase("policies", len(manifest.policies))
    checks = []
    for name, entry in manifest.policies.items():
        carried = [c.cache for c in manifest.configs.values() if c.cache.policy == name]
        settings = [*random_settings(entry.spec), *carried]
        profile = _profile(model.bundle, built.files[entry.graph])
        smallest = {n: tuple(profile[n][0]) if n in profile else s for n, s in SHAPES.items()}
        for form, engine, device, synchronize, shapes in (
            (backend.name, model.engine(entry.graph), model.device, backend.synchronize, smallest),
            (PORTABLE, portable(entry.graph), CPU, _nothing, SHAPES),
        ):
            fault = interface_fault(manifest.graphs[entry.graph], engine)
            if fault is not None:
                checks.append(PolicyCheck(name, form, 0, 0, 0, 0, 0.0, 0.0, (fault,)))
                continue
            compiled = CompiledDecide(engine, device, synchronize)
            checks.append(check_policy(entry.spec, compiled, settings, form=form, shapes=shapes))
        progress.advance(name)
    return checks


def _profile(bundle: Bundle, file: str) -> Mapping[str, Sequence[Sequence[int]]]:
    """Return smallest, usual and largest shape of an engine's inputs; empty where it takes any."""
    profile: Mapping[str, Sequence[Sequence[int]]]
    profile = EngineRecord.read(bundle.path(file)).details.get("profiles", {})
    return profile


def _ranges(
    graph: GraphEntry, profile: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest size of the named dimensions that a profile bounds."""
    return {
        dim: (smallest, largest)
        for name, shapes in profile.items()
        for dim, smallest, _, largest in zip(graph.inputs[name].shape, *shapes, strict=True)
        if isinstance(dim, str)
    }


def _references(
    bundle: Bundle, cut: Cut, segments: Mapping[str, Segment], graph: str, prefix: str
) -> Iterator[tuple[int | None, Reference, dict[str, str]]]:
    """Yield what a graph must equal: once, or for the first, middle and last block it serves."""
    manifest = bundle.manifest
    if graph not in segments:
        yield _group_reference(bundle, cut, segments, graph)
        return
    segment = segments[graph]
    if "{block}" not in segment.prefix:
        yield None, Reference(segment, [_weights(bundle, segment, 0, prefix)]), {}
        return
    parts = {} if manifest.sequence is None else manifest.sequence.blocks
    for stage in manifest.stages:
        own, tapped = (
            [template, *(part.graph for part in parts.get(template or "", []))]
            for template in (stage.block, stage.tapped)
        )
        if graph in tapped and graph not in own:
            blocks = [manifest.feature_block]
        elif graph in (*own, stage.context, stage.modulation):
            last = stage.first + stage.count - 1
            blocks = sorted({stage.first, (stage.first + last) // 2, last})
        else:
            continue
        for block in blocks:
            yield block, Reference(segment, [_weights(bundle, segment, block, prefix)]), {}


def _group_reference(
    bundle: Bundle, cut: Cut, segments: Mapping[str, Segment], graph: str
) -> tuple[int, Reference, dict[str, str]]:
    stage, group = next(
        (s, g) for s in bundle.manifest.stages for g in s.groups if g.graph == graph
    )
    segment = segments[stage.block]
    blocks = range(group.first, group.first + group.count)
    ahead = [segments[n].outputs for n in (stage.context, stage.modulation) if n is not None]
    own = frozenset({n for made in ahead for n in made} | stage.skips.keys() | stage.reads.keys())
    reference = Reference(segment, [_weights(bundle, segment, b) for b in blocks], blocks, own)
    taps = {
        **{n: f"{n}.{blocks[-1]}" for n in segment.outputs if n.endswith("_out")},
        "attention_output": f"attention_output.{bundle.manifest.feature_block}",
    }
    return group.first, reference, taps


def _weights(bundle: Bundle, segment: Segment, block: int, expert: str = "") -> Tensors:
    """Return a segment's parameters by the family's names, whatever the manifest maps them to.

    ``expert`` precedes the names of an expert's tensors.
    """
    prefix = expert + segment.prefix.replace("{block}", str(block))
    names = [n for n, _ in segment.module.named_parameters()]
    return {n: bundle.tensor(prefix + n) for n in names if prefix + n in bundle.manifest.tensors}


def _binder(model: Model, graph: str, block: int | None) -> Callable[[Tensors], Any]:
    return lambda values: model.bind(graph, values, block or 0)


def _portable_binder(
    bundle: Bundle, engine: Engine, graph: str, block: int | None, prefix: str
) -> Callable[[Tensors], Any]:
    patterns = bundle.manifest.graphs[graph].weights
    weights = {
        n: bundle.tensor(prefix + p.replace("{block}", str(block or 0)))
        for n, p in patterns.items()
    }
    return lambda values: engine.bind({**values, **weights})


def _not_portable(graph: GraphEntry) -> str | None:
    if graph.runs == "group":
        return "holds weights: its engine is verified only"
    if graph.precision != "float32":
        return f"is {graph.precision}, which ONNX Runtime has no CPU kernels for"
    return None


@contextmanager
def _portable_engines(bundle: Bundle) -> Iterator[Callable[[str], Engine]]:
    """Yield a function that loads a portable graph into ONNX Runtime."""
    backend: Backend = find_backend(REFERENCE_BACKEND)
    loaded: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder:

        def load(graph: str) -> Engine:
            if graph not in loaded:
                out, adapted = Path(folder) / graph, Path(folder) / f"{graph}.onnx"
                model, _ = run_passes(
                    ir.load(bundle.graph_path(graph)), backend_pipeline(REFERENCE_BACKEND)
                )
                ir.save(model, adapted)
                backend.compile(adapted, Target(), out)
                loaded[graph] = backend.load(out)
            return loaded[graph]

        yield load


def _nothing() -> None:
    """Wait for nothing: the CPU is done when a call returns."""


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _word(ok: bool) -> str:
    return "yes" if ok else "NO"

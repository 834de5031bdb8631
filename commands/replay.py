# SPDX-License-Identifier: Apache-2.0
"""`freewheel replay`: evaluate a policy on a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import RequestError
from .options import (
    BackendOption,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OffloadOption,
    QuietOption,
    SetOption,
    pairs_of,
    quiet_libraries,
)
from .screen import Screen, reporting

if TYPE_CHECKING:
    from ..runtime.model import DeviceOptions

__all__ = ["replay"]


def replay(
    trace: Annotated[
        Path | None, typer.Argument(help="File that `run --record` wrote; not with --suite.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "--config_json",
            "--cache",
            help="Config name or file, or policy; with --suite what `calibrate` wrote.",
        ),
    ] = None,
    set_: SetOption = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Try many values of a parameter: key=first:last:count, or key=a,b,c."),
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(
            help="Bundle: record a suite of runs once, and rank every policy on it without the model."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="With --suite: text file, one prompt per line; 32 do.")
    ] = None,
    steps: Annotated[int, typer.Option(help="With --suite: denoise steps.")] = 50,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a policy on a recorded run, without the model.

    Example: freewheel replay out/trace.npz --config teacache --set threshold=0.2

    Example: freewheel replay out/trace.npz --config teacache --sweep threshold=0.02:0.4:40

    Example: freewheel replay --suite out/bundle --prompts prompts.txt --config calibration.json
    """
    with reporting("replay", as_json, quiet, debug) as screen:
        if suite is not None:
            given = {
                "a trace": trace is not None,
                "--set": bool(set_),
                "--sweep": sweep is not None,
            }
            for name in (n for n, is_given in given.items() if is_given):
                raise RequestError("--suite", f"is given beside {name}", "leave one of them out")
            if prompts is None:
                raise RequestError("--suite", "has no prompt", "give --prompts FILE")
            from ..runtime.model import DeviceOptions

            options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
            _rank(screen, suite, prompts, steps, config, backend, options)
            return
        if trace is None or config is None:
            raise RequestError(
                "replay",
                f"is given no {'trace' if trace is None else 'config'}",
                "name a trace and a --config, or a bundle with --suite",
            )
        from ..configs.load import load_config
        from ..policies import policy
        from ..policies.overrides import apply_overrides
        from ..runtime.settings import warn_of_ignored
        from ..runtime.summary import strip
        from ..tuning.replay import replay as run_replay
        from ..tuning.trace import load_trace

        loaded = load_config(config)
        warn_of_ignored(loaded, config, screen.warn)
        setting = loaded.setting()
        spec = policy(setting.policy).spec
        setting = apply_overrides(setting, pairs_of(set_), spec)
        if sweep is not None:
            from ..tuning.sweep import run_sweep, sweep_table

            rows = run_sweep(load_trace(trace), setting, spec, sweep)
            swept = {"policy": setting.policy, "sweep": [vars(r) for r in rows]}
            screen.result(swept, [sweep_table(rows)])
            return
        data = run_replay(load_trace(trace), setting).as_dict()
        lines = [
            data["policy"]
            + (f" ({data['form']})" if data["form"] else "")
            + f": {data['computed_steps']} of {data['steps']} steps computed, "
            f"ideal speedup {data['ideal_speedup']:.2f}"
        ]
        for name, branch in data["branches"].items():
            errors = [e for e in branch["reuse_error"] if e is not None]
            mean = f"  mean reuse error {sum(errors) / len(errors):.4f}" if errors else ""
            lines.append(f"{name:8} {strip(branch['computed'])}{mean}")
        screen.result(data, lines)


def _rank(
    screen: Screen,
    bundle: Path,
    prompts: Path,
    steps: int,
    config: str | None,
    backend: str | None,
    options: DeviceOptions,
) -> None:
    """Rank every policy on the suite of a bundle."""
    from ..bundle.reader import Bundle
    from ..tuning.bench import read_prompts
    from ..tuning.rank import rank
    from ..tuning.suite_recorder import suite_of

    quiet_libraries()
    opened = Bundle(bundle)
    with screen.progress():
        suite = suite_of(
            opened,
            read_prompts(prompts),
            steps=steps,
            first_seed=1000,
            progress=screen,
            backend=backend,
            options=options,
        )
        found = rank(
            suite, opened.manifest.policies, None if config is None else Path(config), screen
        )
    rows = [
        [
            r.name,
            f"{r.foretold.computed_steps:.1f}",
            f"{r.foretold.mean:.1f}",
            f"{r.foretold.worst:.1f}",
        ]
        for r in found
    ]
    screen.result(
        {
            "suite": dict(suite.about),
            "rows": [
                {
                    "name": r.name,
                    "computed_steps": r.foretold.computed_steps,
                    "mean_db": r.foretold.mean,
                    "worst_db": r.foretold.worst,
                    "distances_db": list(r.foretold.distances),
                }
                for r in found
            ],
        },
        ["\t".join(row) for row in (["setting", "computed", "mean dB", "worst dB"], *rows)],
    )

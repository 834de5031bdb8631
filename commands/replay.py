# SPDX-License-Identifier: Apache-2.0
"""`freewheel replay`: evaluate a policy on a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DebugOption, JsonOption, QuietOption, SetOption, pairs_of
from .screen import reporting

__all__ = ["replay"]


def replay(
    trace: Annotated[Path, typer.Argument(help="File that `run --record` wrote.")],
    config: Annotated[
        str,
        typer.Option(
            "--config", "--config_json", "--cache", help="Config name or file, or policy."
        ),
    ],
    set_: SetOption = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Try many values of a parameter: key=first:last:count, or key=a,b,c."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a policy on a recorded run, without the model.

    Example: freewheel replay out/trace.npz --config teacache --set threshold=0.2

    Example: freewheel replay out/trace.npz --config teacache --sweep threshold=0.02:0.4:40
    """
    with reporting("replay", as_json, quiet, debug) as screen:
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

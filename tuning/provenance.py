# SPDX-License-Identifier: Apache-2.0
"""Say where figures come from: bundle, checkpoint, machine, versions and command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from ..bundle.reader import Bundle
from ..core.cells import counted
from ..engines.doctor import examine

__all__ = ["provenance"]


def provenance(
    bundle: Bundle, backend: str, command: Sequence[str], *, now: datetime | None = None
) -> list[list[str]]:
    """Return names and values, in the order in which a page shows them.

    Args:
        bundle: What ran.
        backend: Name of the backend that ran it.
        command: The program's arguments.
        now: When; None takes the clock's time.
    """
    manifest, machine = bundle.manifest, examine(bundle.folder)
    checkpoint, cpu = manifest.checkpoint, machine["cpu"]
    versions = [f"{n} {v}" for n, v in machine["versions"].items() if v is not None]
    gpus = [f"{g['name']}, CUDA {g['cuda']}" for g in machine["gpus"]]
    cores = counted(cpu["cores"], "core")
    revision = f", revision {checkpoint.revision}" if checkpoint.revision else ""
    return [
        ["command", shlex.join(command)],
        ["bundle", f"{bundle.folder}, made by freewheel {manifest.freewheel_version}"],
        ["checkpoint", f"{checkpoint.source}{revision}, sha256 {checkpoint.sha256[:16]}…"],
        ["transformer", f"{checkpoint.transformer_class}, {manifest.precision}"],
        ["backend", backend],
        ["machine", "; ".join([f"{cpu['model']}, {cores}", *gpus, machine["platform"]])],
        ["versions", ", ".join(versions)],
        ["written", (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")],
    ]

# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark that docs/explanation/performance.md reports, one after the other.

python benchmarks/run_all.py --out out/bench
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ("step.py", "weights_form.py", "precision.py", "taylor_granularity.py")


def main(
    out: Annotated[Path, typer.Option(help="Folder for all tables.")] = Path("out/bench"),
) -> None:
    """Run all benchmarks; stop at the first that fails."""
    for script in SCRIPTS:
        typer.echo(f"{script}:")
        subprocess.run([sys.executable, str(FOLDER / script), "--out", str(out)], check=True)


if __name__ == "__main__":
    typer.run(main)

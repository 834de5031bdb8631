"""Type-check the installed wheel, since checkers don't follow the editable mapping."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Build the wheel, unpack it beside nothing else, and run mypy over the package."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", folder, str(ROOT)], check=True)
        config = str(ROOT / "pyproject.toml")
        cache = str(ROOT / ".mypy_cache")  # of torch and the others: they are most of the work
        mypy = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", cache]
        command = [*mypy, "-p", "freewheel"]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

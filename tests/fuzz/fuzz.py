"""Fuzz one Python reader with atheris, guided by coverage: ``python tests/fuzz/fuzz.py READER``.

Further arguments are libFuzzer's: a corpus folder, ``-max_total_time=600``, … (README.md here).
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["freewheel", "pydantic", "json", "zipfile"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from readers import READERS, outcome


def main() -> None:
    """Run libFuzzer over the reader that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"usage: fuzz.py {{{','.join(READERS)}}} [libFuzzer arguments]")
    name = sys.argv.pop(1)

    def target(content: bytes) -> None:
        assert outcome(name, content), "an error without where or what"

    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

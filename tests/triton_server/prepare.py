"""Build what the tests of this folder serve; runs in the project's own virtual environment.

    .venv/bin/python tests/triton_server/prepare.py out/triton-tests

The tests run in another one, with the server's wheel, which has neither torch nor Freewheel.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from conftest import random_transformer

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import BuildRequest, build
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries
from freewheel.serving.repository import ServeRequest, write_repository


def build_bundle(checkpoint: Path, out: Path, configs: list[str], *, whole: bool) -> Bundle:
    request = BuildRequest(
        model=str(checkpoint), out=out, backends=[backend("openvino")], replace=True,
        configs=config_entries(configs, lambda text: None), with_text_encoder=whole, with_vae=whole,
    )  # fmt: skip
    build(request)
    return Bundle(out)


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for seed, name in enumerate(("tiny", "rebuilt")):
        random_transformer(seed).save_pretrained(out / "checkpoints" / name)
        bundle = build_bundle(out / "checkpoints" / name, out / name, ["off"], whole=False)
        if name == "tiny":
            write_repository(
                ServeRequest(bundle, out / "models", name="tiny", instances=2, threads=1)
            )
    configs = [f"shapes_wan_{p}" for p in ("teacache", "off", "custom")]
    demo = build_bundle(TESTS.parent / "models" / "shapes_wan", out / "demo", configs, whole=True)
    write_repository(ServeRequest(demo, out / "models", name="demo", threads=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

# SPDX-License-Identifier: Apache-2.0
"""A run over two ranks is the run of one process: the same latents, the same decisions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "compiler" / "cut"))
from launching import torchrun
from small_configs import CASES

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.prove import random_weights

JOB = Path(__file__).parent / "guidance_job.py"

TOLERANCE = 1e-5

COVERING = "off,taylorseer,adacache,easycache,firstblock,dmd,teacache"
"""No reuse; known ahead; a feature of tokens, the whole output, a probe, inner products, a signal."""

Built = tuple[str, str, Path, Bundle]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("wan", COVERING), id="wan"),
        *(
            pytest.param((name, ""), id=f"{name}, all", marks=pytest.mark.nightly)
            for name in ("wan", "qwen_image", "flux", "image_to_video", "hunyuan_video")
        ),
    ],
)
def built(
    request: pytest.FixtureRequest,
    repository: Path,
    build_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """A kind of pipeline, the policies to run ("" is all), its checkpoint, and a bundle of it."""
    kind, only = request.param
    if kind == "wan":
        bundle = request.getfixturevalue("demo_bundle")
        return kind, only, repository / "models" / "shapes_wan", bundle
    if kind == "image_to_video":
        checkpoint = request.getfixturevalue("i2v_checkpoint")
        return kind, only, checkpoint, request.getfixturevalue("i2v_bundle")
    class_name, config = CASES[kind]
    folder = tmp_path_factory.mktemp(kind) / "model"
    random_weights(getattr(diffusers, class_name).from_config(config).eval()).save_pretrained(
        folder
    )
    return kind, only, folder, build_bundle(folder, ("onnxruntime",))


@pytest.fixture(scope="module")
def seen(
    built: Built, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    """What both ranks saw, policy by policy."""
    kind, only, checkpoint, bundle = built
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(JOB, kind, checkpoint, bundle.folder, out, only)
    assert done.returncode == 0, done.stderr[-4000:]
    return kind, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_policy_gives_what_one_process_gives(seen: tuple[str, list[dict[str, Any]]]) -> None:
    _, by_rank = seen
    assert len(by_rank[0]) >= 7
    for rank, policies in enumerate(by_rank):
        for policy, found in policies.items():
            assert found["apart"] < TOLERANCE, (rank, policy)
            assert found["as_alone"], (rank, policy)


def test_each_rank_runs_the_branch_that_is_its_own(seen: tuple[str, list[dict[str, Any]]]) -> None:
    kind, by_rank = seen
    others = [] if kind == "flux" else ["uncond"]
    assert {str(f["ran"]) for f in by_rank[0].values()} == {"['cond']"}
    assert {str(f["ran"]) for f in by_rank[1].values()} == {str(others)}


def test_policies_reuse_on_both_ranks(seen: tuple[str, list[dict[str, Any]]]) -> None:
    _, by_rank = seen
    reusing = [f for p, f in by_rank[0].items() if p != "off"]
    assert all(not all(steps) for f in reusing for steps in f["computed"].values())


def test_a_step_sends_one_model_output_computed_or_reused(
    seen: tuple[str, list[dict[str, Any]]],
) -> None:
    kind, by_rank = seen
    for rank, policies in enumerate(by_rank):
        for policy, found in policies.items():
            exchange = found["exchange"]
            assert exchange["formula"].startswith("4 · batch"), exchange
            assert exchange["formula_bytes"] == found["output_bytes"], policy
            sends_nothing = kind == "flux" and rank == 1
            expected = 0 if sends_nothing else found["output_bytes"]
            sent = {exchange["bytes_per_computed_step"], exchange["bytes_per_reused_step"]}
            assert sent - {None} == {expected}, (rank, policy)


def test_a_run_of_one_branch_says_that_a_rank_waits(
    seen: tuple[str, list[dict[str, Any]]],
) -> None:
    kind, by_rank = seen
    for found in by_rank[0].values():
        assert bool(found["warnings"]) == (kind == "flux")
        assert all("one branch, 'cond': rank 1 computed nothing" in w for w in found["warnings"])

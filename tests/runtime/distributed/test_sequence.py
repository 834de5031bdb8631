# SPDX-License-Identifier: Apache-2.0
"""A run whose sequence several ranks share is the run of one process: same latents, same decisions."""

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

JOB = Path(__file__).parent / "sequence_job.py"

TOLERANCE = 1e-5

COVERING = "off,taylorseer,adacache,easycache,firstblock,dmd,teacache by modulated_input"
"""No reuse; known ahead; a feature of tokens, the whole output, a probe, inner products, a signal."""

nightly = pytest.mark.nightly

Seen = tuple[str, int, int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def shared_bundle(
    repository: Path, build_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], tuple[Path, Bundle]]:  # fmt: skip
    """Return a function from a kind of pipeline to its checkpoint, and a bundle of it for ranks."""
    made: dict[str, tuple[Path, Bundle]] = {}

    def find(kind: str) -> tuple[Path, Bundle]:
        if kind not in made:
            if kind == "wan":
                folder = repository / "models" / "shapes_wan"
            elif kind == "image_to_video":
                folder = request.getfixturevalue("i2v_checkpoint")
            else:
                class_name, config = CASES[kind]
                folder = tmp_path_factory.mktemp(kind) / "model"
                model = getattr(diffusers, class_name).from_config(config).eval()
                random_weights(model).save_pretrained(folder)
            made[kind] = folder, build_bundle(folder, ("onnxruntime",), sequence_parallel=True)
        return made[kind]

    return find


@pytest.fixture(
    scope="module",
    params=[
        ("wan", 2, 1, COVERING),
        *(
            pytest.param((kind, ranks, guidance, ""), marks=nightly)
            for kind in ("wan", "image_to_video", "qwen_image", "hunyuan_video")
            for ranks, guidance in ((2, 1), (4, 2))
        ),
        pytest.param(("flux", 2, 1, ""), marks=nightly),
        pytest.param(("wan", 3, 1, COVERING), marks=nightly),
        pytest.param(("qwen_image", 3, 1, COVERING), marks=nightly),
    ],
    ids=lambda one: f"{one[0]}-{one[1]}-over-{one[2]}",
)
def seen(
    request: pytest.FixtureRequest, shared_bundle: Callable[[str], tuple[Path, Bundle]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:  # fmt: skip
    """What every rank saw, policy by policy."""
    kind, ranks, guidance, only = request.param
    checkpoint, bundle = shared_bundle(kind)
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(JOB, kind, checkpoint, bundle.folder, out, guidance, only, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return kind, ranks, guidance, found


def test_every_policy_gives_what_one_process_gives(seen: Seen) -> None:
    *_, by_rank = seen
    assert len(by_rank[0]) >= 7
    for rank, policies in enumerate(by_rank):
        for policy, found in policies.items():
            assert found["apart"] < TOLERANCE, (rank, policy)
            assert found["as_alone"], (rank, policy)
            assert policy == "off" or not all(map(all, found["computed"].values())), policy


def test_a_history_holds_the_tokens_of_its_rank(seen: Seen) -> None:
    _, ranks, guidance, by_rank = seen
    for policy in by_rank[0]:
        held = [found[policy]["tokens"] for found in by_rank]
        branches = {name for one in held for name in one}
        for branch in branches:
            counts = [one[branch] for one in held if branch in one]
            assert len(counts) == ranks // guidance, policy
            assert sum(counts) == by_rank[0][policy]["all_tokens"], policy
            assert max(counts) - min(counts) <= 1, policy


def test_a_step_sends_what_the_formula_gives(seen: Seen) -> None:
    *_, by_rank = seen
    probed, featured = ("firstblock", "dicache"), ("adacache",)
    for rank, policies in enumerate(by_rank):
        for policy, found in policies.items():
            sent = found["exchanges"]["sequence"]
            computed, reused = sent["bytes_per_computed_step"], sent["bytes_per_reused_step"]
            assert sent["formula_bytes"] > sent["formula_bytes_reused"] > 0
            if policy not in featured:
                assert computed == sent["formula_bytes"], (rank, policy)
            else:  # its feature goes round too
                assert computed > sent["formula_bytes"], (rank, policy)
            if policy not in probed and reused is not None:
                assert reused == sent["formula_bytes_reused"], (rank, policy)
            if policy in probed:  # the first block runs at every step
                assert reused > sent["formula_bytes_reused"], (rank, policy)

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
from typer.testing import CliRunner

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.cut.prove import random_weights
from freewheel.core.errors import RequestError
from freewheel.runtime.distributed.layout import layout_of
from freewheel.runtime.distributed.ranks import TIMEOUT, Ranks
from freewheel.runtime.distributed.sequence import SharedModel
from freewheel.runtime.model import DeviceOptions

JOB = Path(__file__).parent / "sequence_job.py"
FAILING = Path(__file__).parent / "failing_run.py"

REQUEST = ("--prompt", "a red circle", "--steps", 4, "--frames", 5, "--seed", 7, "--cache", "off")

TOLERANCE = 1e-5

COVERING = "off,taylorseer,adacache,easycache,firstblock,dmd,teacache by modulated_input"
"""No reuse; known ahead; a feature of tokens, the whole output, a probe, inner products, a signal."""

nightly = pytest.mark.nightly

Seen = tuple[str, int, int, list[dict[str, Any]]]

BundleOf = Callable[[str, str], tuple[Path, Bundle]]


@pytest.fixture(scope="module")
def shared_bundle(
    repository: Path,
    build_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> BundleOf:
    """Return a function from a kind of pipeline and a backend to its checkpoint, and a bundle of it."""
    folders: dict[str, Path] = {"wan": repository / "models" / "shapes_wan"}
    made: dict[tuple[str, str], Bundle] = {}

    def folder_of(kind: str) -> Path:
        if kind == "image_to_video":
            return request.getfixturevalue("i2v_checkpoint")  # type: ignore[no-any-return]
        class_name, config = CASES[kind]
        folder = tmp_path_factory.mktemp(kind) / "model"
        model = getattr(diffusers, class_name).from_config(config).eval()
        random_weights(model).save_pretrained(folder)
        return folder

    def find(kind: str, backend: str) -> tuple[Path, Bundle]:
        if kind not in folders:
            folders[kind] = folder_of(kind)
        if (kind, backend) not in made:
            made[kind, backend] = (
                request.getfixturevalue("sequence_bundle")
                if (kind, backend) == ("wan", "onnxruntime")
                else build_bundle(folders[kind], (backend,), sequence_parallel=True)
            )
        return folders[kind], made[kind, backend]

    return find


@pytest.fixture(
    scope="module",
    params=[
        ("wan", "onnxruntime", 2, 1, COVERING),
        *(
            pytest.param((kind, "onnxruntime", ranks, guidance, ""), marks=nightly)
            for kind in ("wan", "image_to_video", "qwen_image", "hunyuan_video")
            for ranks, guidance in ((2, 1), (4, 2))
        ),
        pytest.param(("flux", "onnxruntime", 2, 1, ""), marks=nightly),
        pytest.param(("wan", "onnxruntime", 3, 1, COVERING), marks=nightly),
        pytest.param(("qwen_image", "onnxruntime", 3, 1, COVERING), marks=nightly),
        pytest.param(("wan", "openvino", 2, 1, ""), marks=nightly),
        pytest.param(("qwen_image", "openvino", 4, 2, ""), marks=nightly),
    ],
    ids=lambda one: "{}-{}-{}-over-{}".format(*one),
)
def seen(
    request: pytest.FixtureRequest,
    shared_bundle: BundleOf,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    """What every rank saw, policy by policy."""
    kind, backend, ranks, guidance, only = request.param
    checkpoint, bundle = shared_bundle(kind, backend)
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(JOB, kind, checkpoint, bundle.folder, out, guidance, only, ranks=ranks)
    assert done.returncode == 0, done.stderr
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
    probed, featured = ("firstblock", "dicache", "dbcache", "dualblock"), ("adacache",)
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


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("killed_in_a_block", "rank"),
        pytest.param("fails_in_a_block", "an exchange: fails; x", marks=nightly),
        pytest.param("killed", "rank", marks=nightly),
        pytest.param("silent", "rank 1: has not answered rank 0 for 30 s", marks=nightly),
        pytest.param("without_memory", "memory", marks=nightly),
        pytest.param("not_finite", "branch 'uncond', step 2", marks=nightly),
        pytest.param(
            "decides_otherwise", "decided otherwise than rank 0: computes is", marks=nightly
        ),
        pytest.param(
            "another_version", "rank 1: the version of freewheel is '0.0.1'", marks=nightly
        ),
        pytest.param("another_request", "rank 1: seed is '8', rank 0's is '7'", marks=nightly),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_one_error(
    sequence_bundle: Bundle, tmp_path: Path, kind: str, said: str
) -> None:
    done = torchrun(
        FAILING,
        kind,
        "run",
        sequence_bundle.folder,
        *REQUEST,
        "--out",
        tmp_path / "video.png",
        **({TIMEOUT: "30"} if kind == "silent" else {}),
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert said in errors[0] or said in done.stderr.split("error:", 1)[1][:300], errors
    assert list(tmp_path.glob("*.png")) == []
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("ranks", "guidance"),
    [pytest.param(2, 1, marks=nightly), pytest.param(4, 2, marks=nightly)],
    ids=["2", "2 x 2"],
)
def test_run_over_ranks_writes_the_picture_of_one_process(
    sequence_bundle: Bundle, tmp_path: Path, ranks: int, guidance: int
) -> None:
    arguments = ("run", sequence_bundle.folder, *REQUEST, "--json")
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    assert CliRunner().invoke(app, [str(a) for a in (*arguments, "--out", alone)]).exit_code == 0
    groups = ("--guidance-ranks", guidance) if guidance > 1 else ()
    done = torchrun("-m", "freewheel", *arguments, *groups, "--out", shared, ranks=ranks)
    assert done.returncode == 0, done.stderr
    exchange = json.loads(done.stdout.splitlines()[-1])["exchange"]
    assert exchange.pop("ranks") == ranks
    assert exchange.keys() == ({"sequence", "guidance"} if guidance > 1 else {"sequence"})
    for counts in exchange.values():
        assert counts["bytes_per_computed_step"] == counts["formula_bytes"] > 0
    assert shared.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("ranks", "guidance", "said"),
    [
        (5, None, "5 ranks: are more than the 4 heads of an attention"),
        (3, 2, "3 ranks: are no 2 equal groups"),
    ],
)
def test_ranks_that_can_not_share_are_refused_before_anything_runs(
    sequence_bundle: Bundle, ranks: int, guidance: int | None, said: str
) -> None:
    def share() -> None:
        layout = layout_of(_ranks(ranks), sequence_bundle.manifest, guidance)
        assert layout.sequence is not None
        SharedModel(sequence_bundle, ranks=layout.sequence)

    with pytest.raises(RequestError, match=said):
        share()


def test_a_bundle_built_without_shares_no_sequence(demo_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="3 ranks: have 2 branches of guidance to share out"):
        layout_of(_ranks(3), demo_bundle.manifest)
    with pytest.raises(RequestError, match="has no graphs for ranks that share a sequence"):
        SharedModel(demo_bundle, ranks=_ranks(2))


@pytest.mark.parametrize("option", ["offload", "cuda_graphs"])
def test_options_of_one_process_are_refused(
    sequence_bundle: Bundle, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedModel, "_check_options", lambda self: None)
    with pytest.raises(RequestError, match=f"--{option.replace('_', '-')}: is for one process"):
        SharedModel(sequence_bundle, None, DeviceOptions(**{option: True}), ranks=_ranks(2))


def _ranks(size: int) -> Ranks:
    """Return ranks of a job that was never started: enough for what is refused ahead."""
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.size, ranks.members = 0, size, tuple(range(size))
    return ranks

# SPDX-License-Identifier: Apache-2.0
"""Seconds of steps at real size, beside diffusers; the figures go into the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_report import Report

from freewheel.bundle.reader import Bundle
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TITLE = "Steps of Wan 2.1 1.3B, random weights, bfloat16, one branch"
SIZES = {"480x832x17": 5, "480x832x81": 21}
"""Height x width x frames → latent frames."""

OPTIONS = {"plain": {}, "CUDA graphs": {"cuda_graphs": True}, "offload": {"offload": True}}
ROUNDS = 3
MOST_REUSED = 0.05
LEAST_EFFICIENCY = 0.95


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the whole geometry; a rehearsal takes one block of it."""
    from synthetic import write_checkpoint

    folder = tmp_path_factory.mktemp("wan") / "transformer"
    layers = 1 if request.config.getoption("--rehearse") else None
    write_checkpoint("wan2.1-t2v-1.3b", folder, layers, "bfloat16")
    return folder


@pytest.fixture(scope="module")
def bundle(build: Callable[..., Bundle], checkpoint: Path) -> Bundle:
    sizes = ("--height", "480", "--width", "832", "--frames", "17:81:81")
    return build(checkpoint, "--config", "off", "--precision", "bfloat16", *sizes)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_reused_steps_cost_next_to_nothing(
    request: pytest.FixtureRequest,
    engines: str,
    bundle: Bundle,
    report: Report,
    size: str,
    option: str,
) -> None:
    from real_size import SETTINGS, prompt_states, run_policy

    rehearsed = bool(request.config.getoption("--rehearse"))
    if rehearsed and (option != "plain" or size != "480x832x17"):
        pytest.skip("one case is enough to rehearse")
    torch.manual_seed(0)
    session = Session(Model(bundle, options=DeviceOptions(**OPTIONS[option])))
    latents = torch.randn(1, 16, SIZES[size], 60, 104)
    session.set_prompt("cond", prompt_states(session))
    for name in ["taylorseer"] if rehearsed else SETTINGS:
        run_policy(session, name, 6, latents)  # settles kernels, captures graphs
        found = run_policy(session, name, 6, latents)
        assert found["finite"]
        reused = found["reused_step_seconds"]
        tell(
            report,
            engines,
            size,
            f"{name}, {option}",
            found["computed_step_seconds"],
            reused,
            f"{found['efficiency']:.3f}",
            most_bytes(),
        )
        # One block of 30 is no step: a rehearsal has nothing to compare reused steps with.
        if reused is not None and not rehearsed:
            assert reused / found["computed_step_seconds"] <= MOST_REUSED
            assert found["efficiency"] >= LEAST_EFFICIENCY


@pytest.mark.parametrize("peer", ["diffusers eager", "torch.compile"])
@pytest.mark.parametrize("size", SIZES)
def test_a_peer_computes_the_same_step(
    request: pytest.FixtureRequest,
    engines: str,
    bundle: Bundle,
    checkpoint: Path,
    report: Report,
    size: str,
    peer: str,
) -> None:
    from diffusers import WanTransformer3DModel

    rehearsed = bool(request.config.getoption("--rehearse"))
    if rehearsed and (peer != "diffusers eager" or size != "480x832x17"):
        pytest.skip("one case is enough to rehearse")
    session = Session(Model(bundle))
    device = session.model.device
    model: Any = WanTransformer3DModel.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    model = model.to(device).eval()
    model = torch.compile(model) if peer == "torch.compile" else model
    torch.manual_seed(0)
    latents = torch.randn(1, 16, SIZES[size], 60, 104, device=device)
    text, timestep = torch.randn(1, 512, 4096, device=device), torch.tensor([500.0], device=device)
    session.set_prompt("cond", {"text_states": text})

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            return model(latents.bfloat16(), timestep, text.bfloat16(), return_dict=False)[0]

    def ours() -> torch.Tensor:
        session.begin(timestep)
        return session.step("cond", 0, {"latents": latents})

    expected, found = theirs().float(), ours().float()
    difference = float((found - expected).norm() / expected.norm())
    taken: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(1 if rehearsed else ROUNDS):
        for name, call in (("theirs", theirs), ("ours", ours)):
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            taken[name].append(time.perf_counter() - began)
    theirs_seconds, ours_seconds = (statistics.median(t) for t in taken.values())
    tell(report, engines, size, peer, theirs_seconds, None, "–", most_bytes())
    columns = ("engines", "size", "peer", "peer s", "freewheel s", "speedup", "relative L2")
    row = [
        engines,
        size,
        peer,
        f"{theirs_seconds:.4f}",
        f"{ours_seconds:.4f}",
        f"{theirs_seconds / ours_seconds:.2f}",
        f"{difference:.1e}",
    ]
    report.table("A computed step against a peer's, interleaved", columns, [row])
    # The peer keeps its residual stream in bfloat16, the engines in float32.
    assert difference < 5e-2


def tell(
    report: Report,
    engines: str,
    size: str,
    what: str,
    computed: float,
    reused: float | None,
    efficiency: str,
    memory: str,
) -> None:
    columns = (
        "engines",
        "size",
        "what",
        "computed step s",
        "reused step s",
        "reused / computed",
        "measured / ideal",
        "most GB on the device",
    )
    shown = ("–", "–") if reused is None else (f"{reused:.4f}", f"{reused / computed:.4f}")
    report.table(
        TITLE, columns, [[engines, size, what, f"{computed:.4f}", *shown, efficiency, memory]]
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def most_bytes() -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if torch.cuda.is_available() else "–"

# SPDX-License-Identifier: Apache-2.0
"""Inside the step loop nothing is bound, nothing allocated, nothing hidden-sized copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_report import Report

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS = 8
LATENTS = (1, 16, 5, 12, 12)
SETTINGS = {
    "teacache": CacheSetting(policy="teacache", parameters={"threshold": 0.3}),
    "teacache on modulated_input": CacheSetting(
        policy="teacache", signal="modulated_input", parameters={"threshold": 0.3}
    ),
    "taylorseer": CacheSetting(policy="taylorseer", parameters={"interval": 3, "order": 2}),
    "adacache": CacheSetting(policy="adacache"),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def opened(bundle: Bundle, name: str, **options: Any) -> Callable[[], None]:
    """Return a function that runs the rest of a run, after two steps have settled everything."""
    session = Session(Model(bundle, options=DeviceOptions(**options)))
    device = session.model.device
    torch.manual_seed(0)
    latents = torch.randn(LATENTS, device=device)
    width = int(session.manifest.inputs["text_states"].shape[-1])
    for branch in ("cond", "uncond"):
        session.set_prompt(branch, {"text_states": torch.randn(1, 16, width, device=device)})

    def run(first: int, last: int) -> None:
        for step in range(first, last):
            for branch in ("cond", "uncond"):
                output = session.step(branch, step, {"latents": latents})
            latents.sub_(output, alpha=0.05)

    # A whole run first: every kernel is compiled, every buffer there.
    session.begin(torch.linspace(999, 30, STEPS), SETTINGS[name])
    run(0, STEPS)
    assert 1 < session.statistics.computed_steps < STEPS
    session.begin(torch.linspace(999, 30, STEPS), SETTINGS[name])
    run(0, 2)
    return lambda: run(2, STEPS)


@every_setting
def test_nothing_is_bound_and_every_output_keeps_its_address(
    engines: str, demo: Callable[..., Bundle], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest, addresses = opened(demo(), name), set()
    step = Session.step

    def watched(session: Session, branch: str, *rest: Any) -> torch.Tensor:
        output = step(session, branch, *rest)
        addresses.add((branch, output.data_ptr()))
        return output

    monkeypatch.setattr(Session, "step", watched)
    monkeypatch.setattr(Model, "bind", lambda *a, **k: pytest.fail("bound inside the loop"))
    rest()
    assert sorted(branch for branch, _ in addresses) == ["cond", "uncond"]


@pytest.mark.usefixtures("cuda")
@every_setting
@pytest.mark.parametrize(
    "options",
    [{}, {"cuda_graphs": True}, {"offload": True}, {"offload": True, "cuda_graphs": True}],
    ids=str,
)
def test_nothing_is_allocated_on_the_device(
    engines: str, demo: Callable[..., Bundle], name: str, options: dict[str, bool]
) -> None:
    # The check of a step for values that are not finite sums into a tensor of its own.
    rest = opened(demo(), name, check_finite=False, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    free, _ = torch.cuda.mem_get_info()
    rest()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.mem_get_info()[0] == free


@pytest.mark.usefixtures("cuda")
@every_setting
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=str)
def test_nothing_hidden_sized_is_copied(
    engines: str,
    demo: Callable[..., Bundle],
    report: Report,
    tmp_path: Path,
    name: str,
    options: dict[str, bool],
) -> None:
    bundle = demo()
    _, _, frames, height, width = LATENTS
    channels = int(bundle.manifest.graphs["head"].outputs["hidden"].shape[-1])
    hidden_bytes = 4 * channels * frames * (height // 2) * (width // 2)
    rest = opened(bundle, name, **options)
    found = copies(rest, tmp_path / "trace.json")
    assert found, "the latents at least are copied into their buffer"
    kinds = sorted({kind for kind, _ in found})
    largest = max(size for _, size in found)
    row = [
        engines,
        f"{name} {options or ''}".strip(),
        len(found),
        largest,
        hidden_bytes,
        ", ".join(kinds),
    ]
    columns = ("engines", "setting", "copies", "largest, bytes", "hidden states, bytes", "kinds")
    report.table("Copies inside the step loop (torch profiler)", columns, [row])
    assert largest < hidden_bytes


@pytest.mark.usefixtures("cuda")
def test_the_profiler_sees_a_copy_to_the_host(engines: str, tmp_path: Path) -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    assert (1 << 20) in {size for _, size in copies(lambda: tensor.cpu(), tmp_path / "trace.json")}


def copies(run: Callable[[], object], path: Path) -> list[tuple[str, int]]:
    """Return kind and bytes of every copy that the device makes while ``run`` runs."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return [(e["name"], int(e["args"]["bytes"])) for e in events if e.get("cat") == "gpu_memcpy"]

# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the TensorRT backend, executed by the stand-in, equal to ONNX Runtime bit for bit.

The feigned GPU refuses a read or write that no wait orders (`tests/rig/host_device.py`), so each run
also shows that its waits suffice.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from driven_runs import OPTIONS, PARAMETERS, POLICIES, STEPS
from graft import grafted
from host_device import PLACE

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError
from freewheel.engines import backend_class
from freewheel.engines.tensorrt import TensorRT, TensorRTRTX
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

pytestmark = pytest.mark.tensorrt
LATENTS = (1, 4, 3, 4, 6)


def setting(policy: str) -> CacheSetting:
    return CacheSetting(policy=policy, parameters=PARAMETERS[policy])


def prompts(session: Session) -> None:
    generator = torch.Generator().manual_seed(0)
    for branch in ("cond", "uncond"):
        states = torch.randn(1, 5, 24, generator=generator)
        session.set_prompt(branch, {"text_states": states})


def run(session: Session, policy: str, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts(session)
    session.begin(torch.linspace(999, 30, STEPS), setting(policy))
    latents, outputs = torch.randn(LATENTS, generator=generator), []
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            output = session.step(branch, step, {"latents": latents})
            outputs += [output.clone()]
        latents = latents - 0.1 * outputs[-2]
    return outputs


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def expected(tiny_bundle: Bundle) -> dict[str, list[torch.Tensor]]:
    session = Session(Model(tiny_bundle, "onnxruntime"))
    found = {}
    for policy in POLICIES:
        found[policy] = run(session, policy)
        counted = session.statistics.computed_steps
        assert (0 < counted < STEPS) == (policy != "off"), f"{policy} computes {counted} steps"
    return found


@pytest.fixture(scope="module")
def plans() -> dict[str, Bundle]:
    """Bundles with plans of each package, compiled once; tests take links of their files."""
    return {}


@pytest.fixture
def bundle(
    expected: Any,
    feigned: Any,
    real_trt: Any,
    tiny_bundle: Bundle,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    plans: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> Bundle:
    """A bundle with plans of the stand-in, and its backend on the feigned GPU."""
    kind = TensorRTRTX if "rtx" in real_trt.__name__ else TensorRT
    made = kind.__init__
    monkeypatch.setattr(
        kind, "__init__", lambda self, **given: made(self, **{"device": PLACE, **given})
    )
    assert backend_class(kind.name) is kind
    if kind.name not in plans:
        folder = tmp_path_factory.mktemp("plans") / "bundle"
        plans[kind.name] = grafted(tiny_bundle, kind(), folder)
    linked = shutil.copytree(plans[kind.name].folder, tmp_path / "bundle", copy_function=os.link)
    return Bundle(Path(linked))


def opened(bundle: Bundle, **options: Any) -> Session:
    backend = bundle.manifest.engines[-1].backend
    return Session(Model(bundle, backend, options=DeviceOptions(**options)))


COVERING = {("tensorrt newest", "offload and graphs"), ("tensorrt-rtx", "plain")}
"""Both packages, engines driven plainly and in every other way at once; the full cross runs nightly."""


@pytest.mark.parametrize(
    ("real_trt", "options"),
    [
        pytest.param(*case, marks=() if case in COVERING else pytest.mark.nightly)
        for case in product(("tensorrt newest", "tensorrt-rtx"), OPTIONS)
    ],
    indirect=["real_trt"],
)
def test_runs_equal_onnxruntime_bit_for_bit(
    bundle: Bundle, expected: Any, feigned: Any, options: str
) -> None:
    session = opened(bundle, **OPTIONS[options])
    for policy in POLICIES:
        assert equal(run(session, policy), expected[policy]), policy
    assert feigned.counts["enqueues on the default stream"] == 0
    assert bool(feigned.device.counts["replays"]) == ("graphs" in options)


def test_graphs_of_a_forgotten_session_do_not_break_a_capture(
    bundle: Bundle, expected: Any, feigned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA breaks a capture in which a graph is freed; Python frees cycles whenever it likes."""
    begin = torch.cuda.graph

    @contextmanager
    def capture(*given: Any, **named: Any) -> Iterator[None]:
        with begin(*given, **named):
            gc.set_threshold(1, 1, 1)
            yield

    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # so that little is alive, and a collection looks at all of it
    gc.set_threshold(1_000_000)
    try:
        session: Any = opened(bundle, cuda_graphs=True)
        run(session, "off")
        session.itself = session  # the garbage collector alone can free it
        monkeypatch.setattr(torch.cuda, "graph", capture)
        session = opened(bundle, cuda_graphs=True)
        assert equal(run(session, "taylorseer"), expected["taylorseer"])
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_sessions_at_once_share_weights_and_disturb_nothing(
    bundle: Bundle, expected: Any, host_device: Any
) -> None:
    jobs: dict[str, dict[str, bool]] = {
        "taylorseer": {},
        "adacache": {"offload": True},
        "easycache": {"cuda_graphs": True},
    }
    found: dict[str, list[torch.Tensor]] = {}
    faults: list[BaseException] = []

    def work(policy: str) -> None:
        try:
            with host_device:
                found[policy] = run(opened(bundle, **jobs[policy]), policy)
        except BaseException as fault:  # shown below
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(p,)) for p in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert all(equal(found[policy], expected[policy]) for policy in found)
    assert len(found) == len(jobs)


def test_the_check_for_finite_values_is_what_allocates(bundle: Bundle, feigned: Any) -> None:
    """And so it is off where allocations are counted, here and in tests/gpu."""
    session, device = opened(bundle), feigned.device
    run(session, "off")
    session.begin(torch.linspace(999, 30, STEPS), setting("off"))
    latents = torch.randn(LATENTS)
    session.step("cond", 0, {"latents": latents})
    device.reset_counts()
    session.step("cond", 1, {"latents": latents})
    assert device.counts["allocations"] > 0


def test_a_gpu_is_chosen_by_its_index(bundle: Bundle, tiny_bundle: Bundle) -> None:
    name = bundle.manifest.engines[-1].backend
    model = Model(bundle, name, options=DeviceOptions(device=1))
    assert model.device == torch.device("cuda", 1)
    assert model.backend.lane.device == torch.device("cuda", 1)
    with pytest.raises(RequestError, match="--device: is 2, and there are 2 GPUs; give 0 to 1"):
        Model(bundle, name, options=DeviceOptions(device=2))
    with pytest.raises(RequestError, match="--device: means nothing to onnxruntime"):
        Model(tiny_bundle, "onnxruntime", options=DeviceOptions(device=0))


BLOCKS = 3
COPIED = 2
"""Blocks whose weights are copied in a computed step: of three, one is where it was."""
COUNTED = {
    # head, blocks, delta, finish; head, reuse, finish. Policies decide ahead here.
    "plain": {"computed": (BLOCKS + 3, 2, 0), "reused": (3, 2, 0)},
    # Beside the two joins: one wait per block for its weights, one per copy for its slab.
    "offload": {"computed": (BLOCKS + 3, 2 + BLOCKS + COPIED, 0), "reused": (3, 2, 0)},
    "graphs": {"computed": (3, 2, 1), "reused": (2, 2, 1)},
    "offload and graphs": {"computed": (3, 2 + BLOCKS + COPIED, BLOCKS), "reused": (2, 2, 1)},
}
"""How engines are driven → enqueues, cross-stream waits and graph replays of one branch's step."""
COPIES = {
    "computed": {"cond": {5}, "uncond": {1}},
    "reused": {"cond": {7, 8}, "uncond": {3, 4}},
}
"""Kind of step → branch → copies smaller than the hidden states. The first branch copies latents and
rows of tables for both, a reused step the mix; it has one factor more once two residuals are held."""
CONTEXTS = 4 * BLOCKS + 17
"""Of each block itself and its keys and values, for two branches; of every other graph that ran."""


@pytest.mark.parametrize("options", OPTIONS)
def test_what_a_step_costs(bundle: Bundle, feigned: Any, options: str) -> None:
    """Counted once everything has run before, with the check for values that are not finite off."""
    session, device = opened(bundle, check_finite=False, **OPTIONS[options]), feigned.device
    run(session, "taylorseer")
    assert len(feigned.contexts) == CONTEXTS
    session.begin(torch.linspace(999, 30, STEPS), setting("taylorseer"))
    latents, hidden = torch.randn(LATENTS), session._shared["hidden"].nbytes
    slabs = COPIED if "offload" in options else 0
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            device.reset_counts()
            feigned.counts.clear()
            session.step(branch, step, {"latents": latents})
            is_computed = session.statistics.branches[branch].computed[step]
            kind, counts = "computed" if is_computed else "reused", device.counts
            found = feigned.counts["enqueues"], counts["waits"], counts["replays"]
            assert found == COUNTED[options][kind]
            assert counts["allocations"] == 0
            assert counts["synchronisations"] == 1
            copied = slabs if is_computed else 0
            assert counts["copies"] - copied in COPIES[kind][branch]
            if not copied:
                assert device.largest < hidden
    assert len(feigned.contexts) == CONTEXTS


WORDS = {
    "plain": "plain",
    "`--offload`": "offload",
    "`--cuda-graphs`": "graphs",
    "both": "offload and graphs",
}
"""What the documentation calls ways of driving engines."""


def test_the_documentation_has_these_counts(repository: Path) -> None:
    text = (repository / "docs" / "explanation" / "tensorrt.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines()]
    counts = [row for row in rows if len(row) == 8 and row[1] in ("computed", "reused")]
    assert len(counts) >= len(OPTIONS)
    values = {"L": BLOCKS, "the blocks copied": COPIED}
    for way, kind, *cells in counts:
        copies = {int(number) for number in re.findall(r"\d+", cells.pop(4))}
        assert copies == set().union(*COPIES[kind].values())
        enqueues, replays, waits, host_waits, allocations = (
            sum(values.get(term) or int(term) for term in cell.split(" + ")) for cell in cells
        )
        assert (enqueues, waits, replays) == COUNTED[WORDS[way]][kind], way
        assert (host_waits, allocations) == (1, 0)
    assert f"holds {CONTEXTS} contexts" in " ".join(text.split())

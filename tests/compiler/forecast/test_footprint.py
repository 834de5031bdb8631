# SPDX-License-Identifier: Apache-2.0
"""Forecast memory against numbers by hand, and against what a session really allocates."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freewheel.bundle.manifest import SkipEntry
from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Cut, Segment
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.forecast.footprint import (
    Footprint,
    activation_bytes,
    amount,
    fit_verdict,
    footprint_of,
)
from freewheel.engines.base import ALIGNMENT, TensorSpec
from freewheel.policies import policies
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

WAN = family_of("WanTransformer3DModel", "")

SPECS = {n: p.spec for n, p in policies().items()}
DIMS = {
    "batch": 1,
    "frames": 3,
    "height": 20,
    "width": 28,
    "tokens": 420,
    "tokens_per_frame": 140,
    "text_tokens": 17,
    "image_tokens": 9,
    "steps": 6,
}
HIDDEN = 420 * 32 * 4


@pytest.fixture(scope="module")
def cut(tiny_bundle: Bundle) -> Cut:
    return cut_of(tiny_bundle)


def forecast(cut: Cut, setting: CacheSetting, branches: int = 1) -> Footprint:
    return footprint_of(cut, DIMS, branches=branches, settings={"chosen": setting}, specs=SPECS)


@pytest.mark.parametrize(
    ("setting", "slots", "signals", "features"),
    [
        (CacheSetting(policy="off"), 0, 0, 0),
        (CacheSetting(policy="teacache"), 1, 2 * 32 * 4, 0),
        (CacheSetting(policy="teacache", signal="timestep_proj"), 1, 2 * 6 * 32 * 4, 0),
        (CacheSetting(policy="teacache", signal="modulated_input"), 1, 2 * HIDDEN, 0),
        (CacheSetting(policy="taylorseer", parameters={"order": 3}), 4, 0, 0),
        (CacheSetting(policy="adacache"), 1, 0, 2 * HIDDEN),
        (CacheSetting(policy="custom"), 2, 2 * 32 * 4, 0),
    ],
)
def test_a_cache_is_its_slots_its_signals_and_its_features(
    cut: Cut, setting: CacheSetting, slots: int, signals: int, features: int
) -> None:
    cache = forecast(cut, setting).caches["chosen"]
    assert cache.slots == slots
    assert cache.history_bytes == slots * HIDDEN
    assert (cache.signal_bytes, cache.feature_bytes) == (signals, features)


def test_buffers_are_those_written_out_by_hand(cut: Cut) -> None:
    footprint = forecast(cut, CacheSetting())
    assert footprint.shared_bytes == {
        "latents": 4 * 3 * 20 * 28 * 4,
        "rope_cos": 420 * 8 * 4,
        "rope_sin": 420 * 8 * 4,
        "hidden states": 3 * HIDDEN,
        "timestep tables": (6 + 1) * (1 + 6 + 2) * 32 * 4,
    }
    assert footprint.branch_bytes == {
        "prompt states": 2 * 17 * 24 * 4,
        "encoder_hidden_states_2": 17 * 32 * 4,
        "context keys and values": 3 * 2 * 17 * 32 * 4,
        "skip connections": 0,
        "timestep tables": 0,
        "model_output": 4 * 3 * 20 * 28 * 4,
    }


class Modulation(torch.nn.Module):
    """What a block makes of a table, or of a table and the prompt."""

    def forward(self, **read: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(read.values()) * 2, dim=1)


@pytest.mark.parametrize("by_prompt", [False, True])
def test_blocks_tables_count_once_or_for_each_branch(cut: Cut, by_prompt: bool) -> None:
    read = dict.fromkeys(["temb", *["pooled"] * by_prompt], TensorSpec("float32", ("steps", 32)))
    made = {"emb": TensorSpec("float32", ("steps", 64))}
    graph = Segment("modulation", "run_block", Modulation(), read, made)
    (stage,) = cut.stages
    modulated = stage.model_copy(update={"modulation": "modulation"})
    whole = replace(cut, segments=(*cut.segments, graph), stages=(modulated,))
    plain, found = forecast(cut, CacheSetting()), forecast(whole, CacheSetting())
    rows = 3 * (6 + 1) * 64 * 4
    more = {
        "shared_bytes": 0 if by_prompt else rows,
        "branch_bytes": rows if by_prompt else 0,
    }
    for kind, expected in more.items():
        bytes_of = [getattr(one, kind)["timestep tables"] for one in (plain, found)]
        assert bytes_of[1] - bytes_of[0] == expected, kind


def test_what_later_stages_read_is_held_once(cut: Cut) -> None:
    (stage,) = cut.stages
    later = stage.model_copy(
        update={"skips": {"hidden_skip": SkipEntry(stream="hidden", blocks=[0, 0, 2])}}
    )
    skipping = replace(cut, stages=(stage, later))
    assert forecast(skipping, CacheSetting()).branch_bytes["skip connections"] == 2 * HIDDEN


def test_low_precision_halves_history_and_context(shared_cut: Callable[..., Cut]) -> None:
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    full, low = (
        footprint_of(
            shared_cut(WAN, config, precision),
            DIMS,
            branches=1,
            settings={"c": CacheSetting(policy="custom")},
            specs=SPECS,
        )
        for precision in ("float32", "bfloat16")
    )
    assert low.caches["c"].history_bytes * 2 == full.caches["c"].history_bytes
    key = "context keys and values"
    assert low.branch_bytes[key] * 2 == full.branch_bytes[key]
    assert low.shared_bytes == full.shared_bytes


def test_guidance_doubles_what_a_branch_holds_and_nothing_else(cut: Cut) -> None:
    one, two = (forecast(cut, CacheSetting(policy="custom"), n).parts("chosen") for n in (1, 2))
    doubled = {"prompt and context", "residual history", "signals and features"}
    assert all(two[n] == (2 * one[n] if n in doubled else one[n]) for n in one)


def test_weights_are_the_tensors_that_a_bundle_brings(tiny_bundle: Bundle, cut: Cut) -> None:
    tensors = tiny_bundle.manifest.tensors
    assert cut.weights() == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert forecast(cut, CacheSetting()).weight_bytes == sum(t.bytes for t in tensors.values())


def test_offloading_leaves_two_blocks_of_each_kind_on_the_device(
    tiny_bundle: Bundle, cut: Cut
) -> None:
    model = Model(tiny_bundle, "onnxruntime", options=DeviceOptions(offload=True))
    inputs, prompt = (
        {"latents": torch.randn(1, 4, 3, 20, 28)},
        {"text_states": torch.randn(1, 17, 24)},
    )
    run(Session(model), inputs, prompt, CacheSetting())
    assert model._offloaded is not None
    held = model._offloaded.resident_bytes() + sum(t.nbytes for t in model._tensors.values())
    footprint = forecast(cut, CacheSetting())
    padding = ALIGNMENT * len(cut.weights())
    assert footprint.offloaded_weight_bytes <= held < footprint.offloaded_weight_bytes + padding
    assert footprint.parts("chosen", offload=True)["weights"] == footprint.offloaded_weight_bytes
    assert footprint.offloaded_weight_bytes < footprint.weight_bytes


@pytest.mark.parametrize("policy", ["off", "teacache", "taylorseer", "adacache"])
def test_a_session_allocates_what_was_forecast(tiny_bundle: Bundle, cut: Cut, policy: str) -> None:
    setting = CacheSetting(policy=policy)
    model = Model(tiny_bundle, "onnxruntime")
    inputs = {"latents": torch.randn(1, 4, 3, 20, 28)}
    prompt = {"text_states": torch.randn(1, 17, 24)}
    run(Session(model), inputs, prompt, setting)  # engines and weights are loaded now
    gc.collect()
    before = held()
    session = Session(model)
    run(session, inputs, prompt, setting)
    gc.collect()
    allocated = sum(size for key, size in held().items() if key not in before)
    parts = forecast(cut, setting).parts("chosen")
    expected = sum(parts.values()) - parts["weights"] - parts["activations"]
    # What is small and not counted: the policy's state, masks and the timesteps themselves.
    assert expected <= allocated <= expected + HIDDEN // 4
    assert session.steps == DIMS["steps"]


def run(session: Session, inputs: dict, prompt: dict, setting: CacheSetting) -> None:
    session.begin(torch.linspace(999, 1, DIMS["steps"]), setting)
    session.set_prompt("cond", prompt)
    for step in range(DIMS["steps"]):
        session.step("cond", step, inputs)


def held() -> dict[int, int]:
    """Return every storage that some tensor holds: address → bytes."""
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages}


def test_activations_grow_with_tokens_and_hold_no_attention_scores(cut: Cut) -> None:
    block = next(s for s in cut.segments if s.name == "block")
    once, twice = (activation_bytes(block, {**DIMS, "tokens": n}) for n in (1000, 2000))
    assert once >= 1000 * 48 * 4
    assert twice == pytest.approx(2 * once, rel=0.1)


def test_a_verdict_names_the_number_that_decides() -> None:
    parts = {"weights": 28 * 10**9, "residual history": 10**9}
    assert fit_verdict(parts, 30 * 10**9, mapped=True) is None
    assert fit_verdict(parts, None, mapped=True) is None
    mapped = fit_verdict(parts, 20 * 10**9, mapped=True)
    assert mapped is not None
    assert mapped.runs
    assert mapped.text.startswith("will not fit: 29.00 GB needed, 20.00 GB available")
    assert "weights decide: 28.00 GB; weights are memory-mapped, so it runs" in mapped.text
    copied = fit_verdict(parts, 20 * 10**9, mapped=False)
    assert copied is not None
    assert not copied.runs
    assert copied.text.endswith("weights decide: 28.00 GB")
    without = fit_verdict(parts, 10**8, mapped=True)
    assert without is not None
    assert not without.runs
    assert without.text.endswith("residual history decide: 1.00 GB")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1500, "1.50 kB"),
        (2 * 10**6, "2.00 MB"),
        (10**10, "10.00 GB"),
        (17654 * 10**10, "176.54 TB"),
    ],
)
def test_amounts_have_their_unit(count: int, text: str) -> None:
    assert amount(count) == text

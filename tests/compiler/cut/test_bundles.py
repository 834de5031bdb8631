# SPDX-License-Identifier: Apache-2.0
"""Bundles whose cut was found: engines equal diffusers at every size, and every policy runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, case, smallest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from bundles import TOLERANCE, check_attach, check_policies, save, session_output, timesteps_of
from chain import relative
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import MODULAR, PIPELINES, pipeline_of
from test_prove import OTHER

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.arguments import filled, leaves_of
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.cut.prove import eager, random_inputs
from freewheel.compiler.cut.row import SIZES
from freewheel.compiler.graphs.write import io_entries
from freewheel.compiler.verify.bundle import verify_bundle
from freewheel.compiler.verify.engines import ROUNDINGS
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.session import Session

FOUND = (
    "qwen_image", "sd3", "sd35", "bria", "bria_fibo", "bria_fibo_2", "chroma", "ovis_image", "prx",
    "joy_image_edit", "pixart", "pixart_alpha",
    "cogview3_plus", "cogview4", "hunyuan_image", "longcat_image", "sana_video",
    "cogvideox", "skyreels_v2", "motif_video", "flux_2", "sana", "hunyuan_image_glyphs",
    "hunyuan_image_distilled",
    "hunyuan_video_15", "mochi", "allegro", "nucleus_image", "z_image", "flux_3", "aura_flow",
    "ace_step", "lumina_2", "krea_2", "ernie_image", "longcat_audio", "wan_vace",
    "ltx_2", "ltx_2_3",
    "hunyuan_dit", "minimax_music_3",
    "glm_image", "kandinsky_6", "consis_id", "any_flow", "minimax_h3", "chrono_edit",
    "easy_animate", "cosmos", "latte", "stable_audio_3", "kandinsky_5", "dit",
    "lumina_next", "wan_animate",
    "stable_audio",  # its row is held out of the table
)  # fmt: skip
EVERY_RUN = ("sd35", "wan_vace", "chroma")
"""Those that C++ runs too, so that their graphs are traced once for both: three kinds of blocks and both
prompts in one batch; skip connections; masks and a table for each block."""
COVERING = ("teacache", "taylorseer", "adacache", "easycache", "firstblock", "dmd")
"""A signal; known ahead; a feature of tokens; the whole output; a probe; inner products. What a policy
looks at is a model's, and no runtime holds a policy's code."""
ASKED = [
    *(pytest.param((name, COVERING), id=name) for name in EVERY_RUN),
    *(pytest.param((name, None), id=f"{name}, all", marks=pytest.mark.nightly) for name in FOUND),
]


@pytest.fixture(scope="module", params=ASKED)
def asked(request: pytest.FixtureRequest) -> tuple[str, tuple[str, ...] | None]:
    """A case, and the policies of its bundle; None is all of them."""
    found: tuple[str, tuple[str, ...] | None] = request.param
    return found


@pytest.fixture(scope="module")
def name(asked: tuple[str, tuple[str, ...] | None]) -> str:
    return asked[0]


@pytest.fixture(scope="module")
def one(name: str) -> Case:
    return case(name)


@pytest.fixture(scope="module")
def bundle(
    one: Case,
    asked: tuple[str, tuple[str, ...] | None],
    tmp_path_factory: pytest.TempPathFactory,
    build_bundle: Callable[..., Bundle],
) -> Bundle:
    model = save(one.model, tmp_path_factory.mktemp(one.row.name) / "model")
    return build_bundle(model, row=one.row, policies=asked[1])


def inputs_at(
    one: Case, bundle: Bundle, counts: dict[str, int]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return inputs by the bundle's names, and what diffusers gives for each of the latents."""
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, counts))
    return named_inputs(bundle, raw), eager(one.row, one.model, raw)


def named_inputs(bundle: Bundle, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a transformer is given, by the bundle's names."""
    given = {}
    for name, entry in bundle.manifest.inputs.items():
        value = raw[entry.argument]
        if isinstance(value, int):
            value = torch.arange(value, dtype=torch.float32)
        if entry.runs == "run":
            value = value[: len(entry.of)] * entry.scale + entry.offset
        given[name] = value
    return given


LARGE_ANGLES = ("nucleus_image", "stable_audio_3")
"""Families that move most with a timestep's rounding: they take sines of up to 1e3, and of up to 2.7e4,
which float32 knows to 6e-5, and to 2e-3."""


def moved_by_rounding(one: Case, counts: dict[str, int]) -> list[float]:
    """Return how far what diffusers gives moves with its timestep's rounding, as `verify` allows it."""
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, counts))
    by = 1.0 + ROUNDINGS * torch.finfo(torch.float32).eps
    runs = {n for n, declared in leaves_of(one.row, config)[1].items() if declared.changes == "run"}
    rounded = {n: value * by if n in runs else value for n, value in raw.items()}
    both = zip(eager(one.row, one.model, rounded), eager(one.row, one.model, raw), strict=True)
    return [relative(moved, wanted) for moved, wanted in both]


FULL = {
    "z_image": ({**SIZES, "height": 4, "width": 8, "text_tokens": 32},),
    "chrono_edit": ({**SIZES, "frames": 2},),
}
"""Family → sizes at which it computes otherwise: a sequence that is padded to a multiple needs no padding,
two frames are the ends of a clip."""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_equal_the_transformer_at_every_size(
    one: Case, bundle: Bundle, backend: str
) -> None:
    session = Session(Model(bundle, backend))
    for counts in (SIZES, OTHER, smallest(one), *FULL.get(one.row.name, ())):
        given, expected = inputs_at(one, bundle, counts)
        session_output(session, given)
        outputs = session.outputs("cond").values()
        is_large = one.row.name in LARGE_ANGLES
        moved = moved_by_rounding(one, counts) if is_large else [0.0] * len(expected)
        for found, wanted, more in zip(outputs, expected, moved, strict=True):
            assert relative(found, wanted) < TOLERANCE + more, counts


def test_every_policy_runs_and_decides_by_content(one: Case, bundle: Bundle) -> None:
    given, _ = inputs_at(one, bundle, SIZES)
    check_policies(bundle, given, "modulated_input")


@pytest.mark.parametrize("policy", ["firstblock"])
def test_a_reused_step_gives_what_the_computed_one_did(
    one: Case, bundle: Bundle, policy: str
) -> None:
    """At equal inputs, of each of the latents; another branch runs between, in the same buffers.

    A third step lies behind both, so that they have the same next one.
    """
    given, _ = inputs_at(one, bundle, SIZES)
    session = Session(Model(bundle, "onnxruntime"))
    guard = GuardSetting(first_exact=1, last_exact=0)
    steps = {n: t.repeat(3) for n, t in timesteps_of(bundle.manifest, given).items()}
    setting = CacheSetting(policy=policy, guard=guard)
    session.begin(steps.pop("latents"), setting, beside={n: steps[n] for n in steps if n != "next"})
    prompts = {n: given[n] for n, i in bundle.manifest.inputs.items() if i.runs == "prompt"}
    latents = {n: given[n] for n in bundle.manifest.latents}
    outputs = []
    for step in range(2):
        for branch, sign in (("cond", 1), ("uncond", -1)):
            session.set_prompt(branch, prompts)
            session.step(branch, step, {n: sign * one for n, one in latents.items()})
            if branch == "cond":
                outputs.append([made.clone() for made in session.outputs(branch).values()])
    assert session.statistics.branches["cond"].computed[:2] == [True, False]
    for first, second in zip(*outputs, strict=True):
        assert relative(second, first) < TOLERANCE


def test_its_pipeline_takes_the_bundle(name: str, one: Case, bundle: Bundle) -> None:
    """Guidance in two branches, or both prompts in one batch; the negative one's mask has padding."""
    if name not in {*PIPELINES, *MODULAR}:
        pytest.skip("its pipeline can't be called without a text encoder")
    pipe, arguments = pipeline_of(name, one)
    by_content = CacheSetting(policy="teacache", parameters={"threshold": 1e6})
    transformer = check_attach(pipe, bundle, arguments, ["taylorseer", by_content])
    assert transformer.session.resolved.signal_name == "modulated_input"


@dataclass(eq=False)
class Loop:
    """A pipeline that is a loop by hand."""

    transformer: Any
    scheduler: Any
    config: dict[str, Any] = field(default_factory=dict)


def test_a_second_timestep_is_taken_where_it_is_the_first(one: Case, bundle: Bundle) -> None:
    same = [name for entry in bundle.manifest.inputs.values() for name in entry.same]
    if not same:
        pytest.skip("it takes one timestep")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    pipe = Loop(one.model, scheduler)
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, {**SIZES, "batch": 1}))
    raw["timestep"] = scheduler.timesteps[:1] / 1000
    expected = eager(one.row, one.model, raw)[0]
    (second,) = same
    attached = attach(pipe, bundle, "off", backend="onnxruntime").module
    found = attached(**raw, **{second: raw["timestep"]}, return_dict=False)[0]
    assert relative(found, expected) < TOLERANCE
    with pytest.raises(RequestError, match=f"argument '{second}': is not the timestep"):
        attached(**raw, **{second: raw["timestep"] / 2})


def test_what_follows_from_the_config_must_be_given_so(one: Case, bundle: Bundle) -> None:
    nested = {n: value for n, value in bundle.manifest.arguments.items() if "." in n}
    if not nested:
        pytest.skip("its pipeline gives no such number")
    ((place, wanted),) = nested.items()
    name, key = place.split(".")
    attached = attach(
        Loop(one.model, FlowMatchEulerDiscreteScheduler()), bundle, "off", backend="onnxruntime"
    ).module
    for given, said in (({key: wanted + 1}, f"is {wanted + 1}"), ({}, "is left out")):
        with pytest.raises(
            RequestError, match=f"'{place}': {said}, the bundle's model has {wanted}"
        ):
            attached(torch.zeros(1), torch.zeros(1), **{name: given})


def test_lists_and_what_attention_is_given_are_inputs(one: Case, bundle: Bundle) -> None:
    """Given as the pipeline gives them, and without the mask, which masks nothing then."""
    masks = [
        i.argument for i in bundle.manifest.inputs.values() if "attention_kwargs." in i.argument
    ]
    if not masks:
        pytest.skip("its attention is given nothing of the prompt")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, {**SIZES, "batch": 1}))
    (changing,) = (i.argument for i in bundle.manifest.inputs.values() if i.runs == "run")
    raw[changing] = scheduler.timesteps[:1] / one.row.timestep_scale
    pipe = Loop(one.model, scheduler)
    attached = attach(pipe, bundle, "off", backend="onnxruntime").module
    for padding in (True, False):
        raw |= {name: raw[name] if padding else torch.ones_like(raw[name]) for name in masks}
        arguments, named = leaves_of(one.row, config)
        given = filled(arguments, (raw[name] for name in named))
        if not padding:
            given |= {name.split(".")[0]: {} for name in masks}
        assert relative(attached(**given)[0], eager(one.row, one.model, raw)[0]) < TOLERANCE


def test_the_next_steps_timestep_is_the_schedulers(name: str, one: Case, bundle: Bundle) -> None:
    if name != "any_flow":
        pytest.skip("its pipeline gives no other")
    pipe, arguments = pipeline_of(name, one)
    attach(pipe, bundle, "off", backend="onnxruntime")
    with pytest.raises(
        RequestError, match="'r_timestep', step 0: is 1000, and the next timestep 500"
    ):
        pipe(**arguments, num_inference_steps=2, use_mean_velocity=False, output_type="latent")


def test_bundle_is_verified_against_its_own_cut(one: Case, bundle: Bundle) -> None:
    """Engines of both backends, portable graphs and policies, as `freewheel verify` checks them."""
    report = verify_bundle(bundle, "openvino")
    assert report.ok, [check for check in report.engines if not check.ok]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["sd35", "wan_vace", "chroma"])
@pytest.mark.parametrize(
    ("options", "bound"),
    [({"weights": "baked"}, TOLERANCE), ({"precision": "bfloat16"}, 3e-2)],
    ids=["baked", "converted"],
)
def test_other_forms_of_weights_give_the_same(
    name: str,
    options: dict[str, Any],
    bound: float,
    tmp_path: Path,
    build_bundle: Callable[..., Bundle],
) -> None:
    """Several kinds of blocks in groups; weights converted to the body's precision."""
    one = case(name)
    bundle = build_bundle(save(one.model, tmp_path / "model"), ("openvino",), **options)
    given, expected = inputs_at(one, bundle, SIZES)
    assert relative(session_output(Session(Model(bundle)), given), expected[0]) < bound


def test_a_bundles_cut_is_read_not_traced(
    one: Case, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freewheel.compiler.cut.declare.cut_model", None)
    cut = cut_of(bundle)
    for segment in cut.segments:
        kept = {n: s for n, s in segment.outputs.items() if n not in segment.dropped}
        assert io_entries(kept) == bundle.manifest.graphs[segment.name].outputs
    assert cut.weights().keys() == bundle.manifest.tensors.keys()

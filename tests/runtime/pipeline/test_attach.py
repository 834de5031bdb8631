"""The diffusers drop-in: a pipeline gives the same with a bundle in its transformer's place."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeZeroStarGuidance,
    FlowMatchEulerDiscreteScheduler,
    SkipLayerGuidance,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import LayerSkipConfig
from safetensors.torch import save_file
from settings import solved_tables

import freewheel
from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError, RequestError
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.attach import attach
from freewheel.tuning.trace import TraceRecorder

PROMPT = "a red circle moving right on a gray background"


@cache
def loaded(repository: Path) -> Any:
    pipe = WanPipeline.from_pretrained(repository / "models" / "shapes_wan", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(repository: Path) -> Any:
    """Return a pipeline of one's own, as `from_pretrained` would."""
    return copy.deepcopy(loaded(repository))


def latents(
    pipe: Any, steps: int = 20, guidance: float = 3.0, size: int = 96, **options: Any
) -> torch.Tensor:
    return pipe(
        PROMPT,
        negative_prompt="",
        height=size,
        width=size,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **options,
    ).frames


def relative_l1(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().mean() / expected.abs().mean())


@pytest.fixture(scope="module")
def plain(repository: Path) -> torch.Tensor:
    return latents(load(repository))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_uncached_pipeline_gives_the_plain_pipelines_latents(
    demo_bundle: Bundle, repository: Path, plain: torch.Tensor, backend: str
) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "off", backend=backend)
    assert relative_l1(latents(pipe), plain) < 1e-4
    assert transformer.statistics.computed_steps == 20


def test_a_timestep_for_each_token_is_the_steps_one_in_text_to_video(
    demo_bundle: Bundle, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan 2.2 TI2V's pipeline hands the transformer [batch, tokens] equal timesteps."""
    pipe = load(repository)
    pipe.register_to_config(expand_timesteps=True)
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda *a, **k: (seen.append(k["timestep"].shape), forward(*a, **k))[1],
    )
    expected = latents(pipe, 6)
    assert all(len(shape) == 2 and shape[1] > 1 for shape in seen)
    attach(pipe, demo_bundle, "off")
    assert relative_l1(latents(pipe, 6), expected) < 1e-4


def test_timesteps_of_the_first_frames_own_are_refused_before_the_run(
    i2v_bundle: Bundle, i2v_checkpoint: Path
) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(i2v_checkpoint)
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(RequestError, match=r"'expand_timesteps': gives the first frame's tokens"):
        attach(pipe, i2v_bundle, "off")
    assert isinstance(pipe.transformer, WanTransformer3DModel)
    assert not hasattr(pipe.transformer, "freewheel")


def test_branches_steps_and_schedulers_follow_the_pipeline(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer")
    first = latents(pipe, 10)
    assert set(transformer.statistics.branches) == {"cond", "uncond"}
    assert transformer.statistics.branches["cond"].computed == [True, False] * 5
    latents(pipe, 6, guidance=1.0, size=64)
    assert set(transformer.statistics.branches) == {"cond"}
    assert transformer.statistics.steps == 6
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents(pipe, 4)
    assert transformer.statistics.steps == 4
    pipe.scheduler = load(repository).scheduler
    assert torch.equal(latents(pipe, 10), first), "earlier runs leave nothing behind"


def test_an_interrupted_run_does_not_leak_into_the_next(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    attach(pipe, demo_bundle, "shapes_wan_custom")
    expected = latents(pipe, 8)

    def interrupt(
        pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, 8, callback_on_step_end=interrupt)
    assert torch.equal(latents(pipe, 8), expected)


def test_pipelines_without_step_indices_are_followed_by_their_timesteps(
    demo_bundle: Bundle, repository: Path
) -> None:
    """Image-to-video pipelines name the branch only."""
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer")
    expected = latents(pipe, 8)
    context = transformer.cache_context
    pipe.transformer.cache_context = lambda name, **where: context(name)
    for _ in range(2):
        assert torch.equal(latents(pipe, 8), expected)


def lora_of(model: Any, seed: int, *, rank: int = 8, **others: torch.Tensor) -> Any:
    """A LoRA on every projection of every block, in diffusers' naming."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(rank, module.in_features, generator=generator) * 0.05
            up = torch.randn(module.out_features, rank, generator=generator) * 0.05
            state[f"transformer.blocks.{name}.lora_A.weight"] = down
            state[f"transformer.blocks.{name}.lora_B.weight"] = up
    return {**state, **others}


VERBS: dict[str, Any] = {
    "load two": lambda pipe: pipe.get_active_adapters(),
    "weights": lambda pipe: pipe.set_adapters(["a", "b"], [0.5, -0.7]),
    "disable": lambda pipe: pipe.disable_lora(),
    "enable": lambda pipe: pipe.enable_lora(),
    "delete": lambda pipe: pipe.delete_adapters("b"),
    "one": lambda pipe: pipe.set_adapters("a", 1.5),
    "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.5),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "fuse again": lambda pipe: pipe.fuse_lora(adapter_names=["a"]),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


def test_every_verb_of_the_adapter_interface_does_what_it_does_in_diffusers(
    demo_bundle: Bundle, repository: Path
) -> None:
    """Compared with diffusers' own transformer after each verb, in one long life."""
    plain, attached = load(repository), load(repository)
    attach(attached, demo_bundle, "off", backend="onnxruntime")
    base = latents(attached, 2, size=32)
    first, second = (lora_of(plain.transformer, seed) for seed in (0, 1))
    for pipe in (plain, attached):
        pipe.load_lora_weights(first, adapter_name="a")
        pipe.load_lora_weights(second, adapter_name="b")
    for verb, call in VERBS.items():
        assert call(plain) == call(attached), verb
        expected, found = latents(plain, 2, size=32), latents(attached, 2, size=32)
        assert relative_l1(found, expected) < 1e-4, verb
        assert plain.get_list_adapters() == attached.get_list_adapters(), verb
        if verb in ("disable", "unfuse"):
            assert torch.equal(found, base) == (verb == "disable"), verb
    assert not torch.equal(found, base), "fused, then unloaded: it stays, as in diffusers"
    with pytest.raises(RequestError, match=r"has adapters fused into it; call pipe.unfuse_lora"):
        attach(attached, demo_bundle, "off")


def test_unloading_goes_back_to_the_base_bit_for_bit(demo_bundle: Bundle, repository: Path) -> None:
    pipe = load(repository)
    attach(pipe, demo_bundle, "off", backend="onnxruntime")
    base, state = latents(pipe, 2, size=32), lora_of(pipe.transformer, 2)
    for _ in range(2):
        pipe.load_lora_weights(state)
        assert not torch.equal(latents(pipe, 2, size=32), base)
        pipe.fuse_lora()
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe, 2, size=32), base)


def test_scales_are_taken_from_wherever_a_file_has_them(
    demo_bundle: Bundle, repository: Path, tmp_path: Path
) -> None:
    """The header's alpha, rank pattern and rsLoRA; DoRA's magnitudes."""
    plain, attached = load(repository), load(repository)
    attach(attached, demo_bundle, "off", backend="onnxruntime")
    state, file = lora_of(plain.transformer, 3, rank=4), tmp_path / "lora.safetensors"
    targets = sorted({k.split(".")[-3] for k in state})
    magnitudes = {
        k.replace("lora_B.weight", "lora_magnitude_vector"): v.norm(dim=1) + 0.5
        for k, v in state.items()
        if "lora_B" in k
    }
    header = {"r": 4, "lora_alpha": 16, "target_modules": targets}
    patterns = {**header, "alpha_pattern": {"to_q": 2.0}, "use_rslora": True}
    unscaled = None
    for metadata, others in (({}, {}), (header, {}), (patterns, {}), ({}, magnitudes)):
        text = json.dumps({f"transformer.{k}": v for k, v in metadata.items()})
        save_file({**state, **others}, file, {"lora_adapter_metadata": text} if metadata else None)
        for pipe in (plain, attached):
            pipe.load_lora_weights(file)
        expected, found = latents(plain, 2, size=32), latents(attached, 2, size=32)
        assert relative_l1(found, expected) < 1e-4
        if unscaled is not None:
            assert relative_l1(found, unscaled) > 0.001
        unscaled = found if unscaled is None else unscaled
        for pipe in (plain, attached):
            pipe.unload_lora_weights()


def test_given_loras_stay_whatever_is_loaded_later(
    demo_bundle: Bundle, repository: Path, tmp_path: Path
) -> None:
    """Through --lora too, which is the same argument."""
    plain, attached = load(repository), load(repository)
    file = tmp_path / "lora.safetensors"
    first, second = (lora_of(plain.transformer, seed) for seed in (4, 5))
    save_file(first, file)
    attach(attached, demo_bundle, "off", backend="onnxruntime", loras=[f"{file}:0.8"])
    alone = latents(attached, 2, size=32)
    plain.load_lora_weights(first, adapter_name="a")
    plain.set_adapters("a", 0.8)
    assert relative_l1(alone, latents(plain, 2, size=32)) < 1e-4
    plain.load_lora_weights(second, adapter_name="b")
    plain.set_adapters(["a", "b"], [0.8, 1.0])
    attached.load_lora_weights(second)
    assert relative_l1(latents(attached, 2, size=32), latents(plain, 2, size=32)) < 1e-4
    both, copied = latents(attached, 2, size=32), copy.deepcopy(attached)
    copied.fuse_lora()
    again = copy.deepcopy(copied)
    for pipe in (copied, again):
        assert relative_l1(latents(pipe, 2, size=32), both) < 1e-5, "a copy takes all along"
    again.unfuse_lora()
    again.unload_lora_weights()
    assert torch.equal(latents(again, 2, size=32), alone)
    assert torch.equal(latents(attached, 2, size=32), both), "and is on its own"
    attached.unload_lora_weights()
    assert torch.equal(latents(attached, 2, size=32), alone)
    attach(attached, demo_bundle, "off", backend="onnxruntime")
    plain.disable_lora()
    assert relative_l1(latents(attached, 2, size=32), latents(plain, 2, size=32)) < 1e-4


def test_adapters_loaded_before_are_taken_over(demo_bundle: Bundle, repository: Path) -> None:
    pipe = load(repository)
    pipe.load_lora_weights(lora_of(pipe.transformer, 6), adapter_name="a")
    pipe.set_adapters("a", 0.7)
    expected = latents(pipe, 2, size=32)
    pipe.fuse_lora()
    with pytest.raises(RequestError, match=r"adapter 'a'.*is fused.*call pipe.unfuse_lora\(\)"):
        attach(pipe, demo_bundle, "off")
    pipe.unfuse_lora()
    attach(pipe, demo_bundle, "off", backend="onnxruntime")
    assert relative_l1(latents(pipe, 2, size=32), expected) < 1e-4
    pipe.set_adapters("a", 0.0)
    assert relative_l1(latents(pipe, 2, size=32), latents(load(repository), 2, size=32)) < 1e-4


def test_another_transformer_is_refused_by_what_differs(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    own = pipe.transformer
    pipe.load_lora_weights(lora_of(own, 7))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(RequestError, match=r"weight 'blocks.0.*holds other values.*attach to the"):
        attach(pipe, demo_bundle, "off")
    assert pipe.transformer is own, "a refused attach leaves the pipeline as it was"
    pipe.transformer = WanTransformer3DModel.from_config({**own.config, "num_layers": 1})
    with pytest.raises(RequestError, match=r"transformer config 'num_layers': is 1, the bundle"):
        attach(pipe, demo_bundle, "off")
    pipe.transformer = WanVACETransformer3DModel.from_config({**own.config, "vace_layers": [0]})
    with pytest.raises(RequestError, match=r"is WanVACETransformer3DModel, the bundle was built"):
        attach(pipe, demo_bundle, "off")
    half = WanPipeline.from_pretrained(repository / "models" / "shapes_wan", dtype=torch.float16)
    attach(half, demo_bundle, "off")  # the same weights, rounded


def test_a_failed_run_leaves_nothing_behind(demo_bundle: Bundle, repository: Path) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer", backend="onnxruntime")
    expected = latents(pipe, 10, size=32)
    run_step = transformer.session.step
    for failing in ("cond", "uncond"):

        def fail(branch: str, step_index: int, inputs: Any, failing: str = failing) -> Any:
            if (branch, step_index) == (failing, 4):
                raise MemoryError
            return run_step(branch, step_index, inputs)

        transformer.session.step = fail  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            latents(pipe, 10, size=32)
        transformer.session.step = run_step  # type: ignore[method-assign]
        assert torch.equal(latents(pipe, 10, size=32), expected)
    with pytest.raises(ConfigError):
        transformer.use("no such policy")
    assert transformer.setting.policy == "taylorseer", "a refused setting changes nothing"
    transformer.use("off")
    latents(pipe, 10, size=32)
    assert transformer.statistics.policy == "off"
    assert transformer.statistics.computed_steps == 10


def test_a_guidance_interval_computes_on_its_return_and_caches_on(
    demo_bundle: Bundle, repository: Path
) -> None:
    def interval(
        pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        pipeline._guidance_scale = 1.0 if step in (0, 1, 2) else 3.0
        return tensors

    plain, pipe = load(repository), load(repository)
    expected = latents(plain, 10, size=32, callback_on_step_end=interval)
    transformer = attach(pipe, demo_bundle, "off", backend="onnxruntime")
    found = latents(pipe, 10, size=32, callback_on_step_end=interval)
    assert relative_l1(found, expected) < 1e-4
    transformer.use("shapes_wan_taylorseer")
    latents(pipe, 10, size=32, callback_on_step_end=interval)
    branches = transformer.statistics.branches
    assert branches["cond"].computed == [True, False] * 5
    interval_of_uncond = [True, None, None, None, True, False, True, False, True, False]
    assert branches["uncond"].computed == interval_of_uncond
    assert transformer.summary().splitlines()[-1] == "uncond █···█░█░█░"
    transformer.recorder = TraceRecorder()
    latents(pipe, 10, size=32, callback_on_step_end=interval)
    with pytest.raises(RequestError, match=r"branch 'uncond': was recorded for 7 of 10 steps"):
        transformer.recorder.trace()


def guided(pipe: Any, guider: Any) -> torch.Tensor:
    """Denoise with one of diffusers' guiders, by the loop of the pipelines that have one."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, 16, pipe.transformer.config.text_dim, generator=generator)
    sample = torch.randn(1, pipe.transformer.config.in_channels, 2, 4, 4, generator=generator)
    pipe.scheduler.set_timesteps(8)
    for step, t in enumerate(pipe.scheduler.timesteps):
        guider.set_state(step=step, num_inference_steps=8, timestep=t)
        batches = guider.prepare_inputs({"encoder_hidden_states": tuple(text)})
        for batch in batches:
            guider.prepare_models(pipe.transformer)
            with pipe.transformer.cache_context(getattr(batch, guider._identifier_key)):
                states = batch.encoder_hidden_states
                batch.noise_pred = pipe.transformer(sample, t[None], states, return_dict=False)[0]
            guider.cleanup_models(pipe.transformer)
        sample = pipe.scheduler.step(guider(batches)[0], t, sample, return_dict=False)[0]
    return sample


@torch.no_grad()
def test_guiders_of_diffusers_guide(demo_bundle: Bundle, repository: Path) -> None:
    """CFG-Zero, and guidance of the middle steps alone; guiders that change the model are refused."""
    plain, pipe = load(repository), load(repository)
    transformer = attach(pipe, demo_bundle, "off", backend="onnxruntime")
    zero = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=2)
    middle = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, start=0.25, stop=0.75)
    found = {}
    for name, guider in (("zero", zero), ("middle", middle)):
        found[name] = guided(pipe, guider)
        assert relative_l1(found[name], guided(plain, guider)) < 1e-4, name
    assert (
        transformer.statistics.branches["uncond"].computed == [None] * 2 + [True] * 4 + [None] * 2
    )
    assert relative_l1(*found.values()) > 0.01
    transformer.use("shapes_wan_taylorseer")
    guided(pipe, zero)
    assert transformer.statistics.branches["uncond"].computed == [True, False] * 4
    every = {"parameters": {"interval": 2}, "branches": {"uncond": {"interval": 4}}}
    transformer.use(CacheSetting(policy="taylorseer", **every))
    guided(pipe, zero)
    found = {name: branch.computed for name, branch in transformer.statistics.branches.items()}
    assert found["uncond"] == [True, False, False, False] * 2
    assert found["cond"] == [True, False] * 4
    skipped = LayerSkipConfig(indices=[1], fqn="blocks")
    skipping = SkipLayerGuidance(skip_layer_config=skipped, skip_layer_guidance_stop=1.0)
    with pytest.raises(RequestError, match=r"transformer, 'blocks.1': has a TransformerBlockSkip"):
        guided(pipe, skipping)
    skipping.cleanup_models(pipe.transformer)
    assert torch.equal(guided(pipe, zero), guided(pipe, zero))


def other_pipelines(pipe: Any) -> dict[str, Any]:
    own = WanPipeline(**pipe.components)
    own.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {
        "from_pipe": WanPipeline.from_pipe(pipe),
        "components": own,
        "deepcopy": copy.deepcopy(pipe),
    }


def test_the_pipeline_that_calls_is_the_one_that_counts(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    expected = {n: latents(other, 6, size=32) for n, other in other_pipelines(pipe).items()}
    attach(pipe, demo_bundle, "off", backend="onnxruntime")
    others = other_pipelines(pipe)
    first = pipe.transformer
    del pipe
    gc.collect()
    for name, other in others.items():
        other.set_progress_bar_config(disable=True)
        assert relative_l1(latents(other, 6, size=32), expected[name]) < 1e-4, name
        assert other.transformer.freewheel.statistics.steps == 6
        assert (other.transformer is first) == (name != "deepcopy")
    others["deepcopy"].transformer.freewheel.use("shapes_wan_taylorseer")
    assert first.freewheel.setting.policy == "off", "a copy's setting is its own"


def test_a_video_to_video_run_begins_within_the_schedule(
    demo_bundle: Bundle, repository: Path
) -> None:
    base = load(repository)
    # Encoded already: diffusers' pipeline takes another scale for the demo's VAE.
    encoded = torch.randn(1, base.transformer.config.in_channels, 2, 4, 4)

    def run(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            None, PROMPT, negative_prompt="", latents=encoded, height=32, width=32, num_inference_steps=10,
            strength=0.6, guidance_scale=3.0, max_sequence_length=16, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).frames  # fmt: skip

    expected = run(WanVideoToVideoPipeline.from_pipe(base, scheduler=base.scheduler))
    transformer = attach(base, demo_bundle, "off", backend="onnxruntime")
    assert relative_l1(run(WanVideoToVideoPipeline.from_pipe(base)), expected) < 1e-4
    assert transformer.statistics.steps == 6
    levels = base.scheduler.sigmas[:10].tolist()
    tables = solved_tables(10, {(0, 2, 6, 9): [[1.0]] * 6})
    warned: list[str] = []
    transformer.warn = warned.append
    for sigmas, computed in ((levels, "#.#..#"), ([0.0], "#.#.#.")):
        transformer.use(CacheSetting(policy="solved", parameters={**tables, "sigmas": sigmas}))
        run(WanVideoToVideoPipeline.from_pipe(base))
        found = transformer.statistics.branches["cond"].computed
        assert "".join("#" if c else "." for c in found) == computed
    (text,) = [text for text in warned if "stretched" in text]
    assert "made for 10 steps and are stretched from 10 to 6" in text
    transformer.use("off")
    assert torch.equal(latents(base, 6, size=32), latents(base, 6, size=32))


def test_policies_are_given_the_schedulers_own_noise_levels(
    demo_bundle: Bundle, repository: Path
) -> None:
    class Kept:
        wants_signals = across_experts = False
        schedule: Schedule

        def on_run(self, tables: object, schedule: Schedule) -> None:
            self.schedule = schedule

        def on_step(self, record: object, dims: object) -> None:
            pass

    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "off", backend="onnxruntime")
    transformer.recorder = kept = Kept()
    latents(pipe, 4, size=32)
    assert kept.schedule.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert kept.schedule.sigmas == tuple(pipe.scheduler.sigmas[:4].tolist())
    # UniPC rounds its timesteps down, so that they tell the levels roughly alone.
    assert kept.schedule != Schedule.of(kept.schedule.timesteps)


def test_a_loop_by_hand_needs_no_cache_contexts(demo_bundle: Bundle, repository: Path) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer", backend="onnxruntime")
    text = torch.randn(2, 1, 16, pipe.transformer.config.text_dim)
    noise = torch.randn(1, pipe.transformer.config.in_channels, 2, 4, 4)

    def loop(named: bool) -> torch.Tensor:
        pipe.scheduler.set_timesteps(6)
        sample = noise
        for t in pipe.scheduler.timesteps:
            answers = []
            for name, states in zip(("cond", "uncond"), text, strict=True):
                with pipe.transformer.cache_context(name) if named else nullcontext():
                    answers.append(pipe.transformer(sample, t[None], states).sample)
            sample = pipe.scheduler.step(sum(answers), t, sample).prev_sample
        return sample

    first = loop(named=True)
    assert torch.equal(loop(named=True), first)
    assert torch.equal(loop(named=False), first), "branches are told apart by their prompts"
    assert transformer.statistics.branches["uncond"].computed == [True, False] * 3
    pipe.scheduler.set_timesteps(6)
    for t in pipe.scheduler.timesteps:
        pipe.transformer(noise, t[None], torch.randn(text[0].shape))
    assert set(transformer.statistics.branches) == {"cond"}, "a prompt may change during a run"
    pipe.scheduler.set_timesteps(6)
    first_step = (noise, pipe.scheduler.timesteps[:1], text[0])
    nothing = {"resolution": None, "sizes": [None, None]}
    pipe.transformer(*first_step, added_cond_kwargs=nothing)
    with pytest.raises(RequestError, match=r"'added_cond_kwargs': is nothing that"):
        pipe.transformer(*first_step, added_cond_kwargs={**nothing, "sizes": [None, 1]})
    text[1] = text[0]
    with pytest.raises(RequestError, match=r"branch 'cond' there.*name the branch with .*_context"):
        loop(named=False)
    with pytest.raises(RequestError, match=r"can't be placed.*attach to this pipeline"):
        pipe.transformer(noise, torch.tensor([123.25]), text[0])
    fewer = {"callback_on_step_end": lambda pipe, *_: pipe.scheduler.set_timesteps(3) or {}}
    with pytest.raises(RequestError, match=r"can't be placed"):
        latents(pipe, 6, size=32, **fewer)


def test_warnings_of_the_command_line_are_given_once(demo_bundle: Bundle, repository: Path) -> None:
    pipe = load(repository)
    attach(pipe, demo_bundle, "teacache", backend="onnxruntime").use(
        CacheSetting(policy="teacache", parameters={"threshold": 0.0})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            latents(pipe, 4, size=32)
    texts = [str(w.message) for w in caught]
    assert sum("few-step sampling" in t for t in texts) == 1
    assert sum("reused nothing in branch 'cond' and 'uncond'" in t for t in texts) == 1


def test_wrong_loras_are_refused(demo_bundle: Bundle, repository: Path, tmp_path: Path) -> None:
    pipe = load(repository)
    with pytest.raises(RequestError, match=r"--lora 'missing.safetensors'.*is not a file.*give a"):
        attach(pipe, demo_bundle, "off", loras=["missing.safetensors"])
    file = tmp_path / "other.safetensors"
    down, up = torch.zeros(4, 99), torch.zeros(256, 4)
    module = "transformer.blocks.0.attn1.to_q"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, file)
    with pytest.raises(RequestError, match=r"module 'blocks.0.attn1.to_q'.*updates \[256, 99\]"):
        attach(pipe, demo_bundle, "off", loras=[str(file)])
    save_file(
        {"transformer.nowhere.lora_A.weight": down, "transformer.nowhere.lora_B.weight": up}, file
    )
    with pytest.raises(RequestError, match=r"1 of 1 modules are not in the model.*'nowhere'"):
        attach(pipe, demo_bundle, "off", loras=[str(file)])


def test_what_was_attached_is_detached_again(
    demo_bundle: Bundle, repository: Path, plain: torch.Tensor
) -> None:
    pipe = load(repository)
    own = pipe.transformer
    transformer = freewheel.attach(pipe, demo_bundle, "off", backend="onnxruntime")
    assert pipe.transformer is transformer.module
    transformer.detach()
    assert pipe.transformer is own
    assert torch.equal(latents(pipe), plain)
    with pytest.raises(RequestError, match="this is not what stands in the pipeline"):
        transformer.detach()
    with freewheel.attached(pipe, demo_bundle, "off", backend="onnxruntime") as transformer:
        assert pipe.transformer is transformer.module
    assert pipe.transformer is own

    def fail_inside() -> None:
        with freewheel.attached(pipe, demo_bundle, "off", backend="onnxruntime"):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert pipe.transformer is own


def test_a_transformer_that_nobody_held_is_freed_and_detach_says_so(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    gone = weakref.ref(pipe.transformer)
    transformer = attach(pipe, demo_bundle, "off", backend="onnxruntime")
    gc.collect()
    assert gone() is None, "attach keeps no second copy of the weights"
    with pytest.raises(RequestError, match=r"'transformer': .*was freed; hold it.*attached"):
        transformer.detach()


def test_parameters_are_given_by_name(demo_bundle: Bundle, repository: Path) -> None:
    transformer = attach(load(repository), demo_bundle, backend="onnxruntime")
    setting = transformer.use("teacache", threshold=0.3, coefficients=[2.0, 0.0], first_exact=2)
    assert setting == transformer.setting
    assert setting.parameters == {"threshold": 0.3, "coefficients": [2.0, 0.0]}
    assert setting.guard.first_exact == 2
    assert transformer.use("teacache", signal="modulated_input").signal == "modulated_input"
    with pytest.raises(ConfigError, match=r"parameter 'treshold'.*did you mean 'threshold'"):
        transformer.use("teacache", treshold=0.3)
    assert freewheel.CacheSetting is CacheSetting


def test_what_was_attached_says_what_it_is_and_what_it_did(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "taylorseer", backend="onnxruntime")
    start = "<FreewheelTransformer WanTransformer3DModel on onnxruntime, taylorseer, "
    assert repr(transformer) == f"{start}no run yet>"
    assert transformer.summary().endswith("no run yet")
    latents(pipe, 10, size=32)
    assert repr(transformer) == f"{start}3 of 10 steps computed>"
    assert isinstance(transformer.statistics.computed_steps, int)
    head, *strips = transformer.summary().splitlines()
    assert head.startswith("taylorseer: 3 of 10 steps computed, ideal speedup 3.33, estimated ")
    assert strips == ["cond   █░░░█░░░█░", "uncond █░░░█░░░█░"]

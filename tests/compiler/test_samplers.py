"""Sampler tables against the schedulers that they were probed from."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from freewheel.bundle.sampler import TABULATED
from freewheel.bundle.sampler_table import SamplerTable
from freewheel.compiler.samplers import bring_samplers, probe, sampler_name, write_tables
from freewheel.core.errors import BuildError
from freewheel.runtime.pipeline.schedulers import make_scheduler

WINDOWS = {"euler": 1, "dpmpp_2m": 2, "unipc": 3, "distilled": 1}


def model(sample, step):
    """Stand in for a model: not linear, different at every step."""
    return np.tanh(1.3 * sample + 0.1 * step) - 0.2 * np.roll(sample, 1)


def run_scheduler(scheduler, steps, start):
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(start)
    for index, timestep in enumerate(scheduler.timesteps):
        output = torch.from_numpy(model(sample.numpy(), index))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample.numpy()


def run_table(table, start):
    samples, outputs = [torch.from_numpy(start)], []
    for index in range(len(table.timesteps)):
        outputs.append(torch.from_numpy(model(samples[-1].numpy(), index)))
        samples.append(table.advance(index, samples, outputs))
    return samples[-1].numpy()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 30, 50])
@pytest.mark.parametrize("name", TABULATED)
def test_table_follows_its_scheduler_over_a_whole_trajectory(name, steps, shift):
    start = np.random.default_rng(steps).standard_normal((1, 16, 3, 4), np.float32)
    expected = run_scheduler(make_scheduler(name, shift), steps, start)
    found = run_table(probe(make_scheduler(name, shift), steps, WINDOWS[name]), start)
    # Both round to float32 once per step and term; the tables themselves are exact to 1e-8.
    assert np.abs(found - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", TABULATED)
def test_least_window_is_found(name):
    assert probe(make_scheduler(name, 3.0), 20).window == WINDOWS[name]


@pytest.mark.parametrize("name", TABULATED)
def test_timesteps_and_sigmas_are_the_schedulers(name):
    scheduler = make_scheduler(name, 3.0)
    scheduler.set_timesteps(12)
    table = probe(make_scheduler(name, 3.0), 12)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(table.sigmas, scheduler.sigmas.numpy()[:12].astype(np.float64))
    assert (np.diff(table.sigmas) < 0).all()


def test_a_sampler_that_draws_noise_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(
        BuildError, match=r"FlowMatchEulerDiscreteScheduler.*recurrence.*use one of"
    ):
        probe(scheduler, 10)


def test_a_sampler_that_clips_is_refused():
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=True
    )
    with pytest.raises(BuildError, match="UniPCMultistepScheduler"):
        probe(scheduler, 10)


def test_file_holds_every_step_count(tmp_path):
    config = {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": 3.0,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    entries = write_tables(tmp_path, config, [3.0, 5.0], [4, 9])
    assert entries[0].name == entries[1].name == "unipc"
    assert len(entries) == 2 * len(TABULATED)
    for entry in entries:
        tables = load_file(tmp_path / entry.file)
        assert {int(n) for n in tables} == set(entry.steps) == {4, 9}
        for steps, table in tables.items():
            assert table.shape == (int(steps), 2 + 2 * entry.window)
            assert table.dtype == np.float64
            assert np.isfinite(table).all()


def test_a_turned_output_has_the_other_factors(tmp_path):
    """Of Z-Image, whose pipeline steps with the model output's opposite."""
    for sign in (1, -1):
        (tmp_path / str(sign)).mkdir()
        entries = write_tables(tmp_path / str(sign), None, [3.0], [4, 9], output_sign=sign)
    for entry in entries:
        for steps in ("4", "9"):
            plain, turned = (load_file(tmp_path / s / entry.file)[steps] for s in ("1", "-1"))
            ahead = 2 + entry.window
            np.testing.assert_array_equal(turned[:, :ahead], plain[:, :ahead])
            np.testing.assert_array_equal(turned[:, ahead:], -plain[:, ahead:])
            assert abs(plain[:, ahead:]).sum() > 0


def test_a_list_of_steps_is_tabulated_at_its_own_count(tmp_path):
    name = "steps_1000_908.8427_713.9794"
    entries = write_tables(tmp_path, None, [5.0], [4, 9], lists=[name])
    entry = next(e for e in entries if e.name == name)
    assert (entry.steps, entry.scheduler, entry.window) == ([3], "StepListScheduler", 1)
    levels = np.array([1.0, 0.9088427, 0.7139794, 0.0])
    sigmas = 5 * levels / (1 + 4 * levels)
    table = load_file(tmp_path / entry.file)["3"]
    np.testing.assert_allclose(table[:, 0], 1000 * sigmas[:3], rtol=1e-6)
    np.testing.assert_allclose(table[:, 2], 1, rtol=1e-6)
    np.testing.assert_allclose(table[:, 3], np.diff(sigmas), rtol=1e-5)


def test_a_step_count_that_the_scheduler_can_not_run_is_left_out(tmp_path):
    """UniPC at shift 12, Wan 2.2's, takes two of 100 timesteps for one and stops."""
    entries = {e.name: e.steps for e in write_tables(tmp_path, None, [12.0], [50, 100])}
    assert entries["unipc"] == [50]
    assert entries["euler"] == [50, 100]


def test_files_are_small(tmp_path):
    entries = write_tables(tmp_path, None, [3.0])
    assert sum((tmp_path / e.file).stat().st_size for e in entries) < 1 << 20


def test_sampler_names_are_found_by_class():
    assert sampler_name("UniPCMultistepScheduler") == "unipc"
    assert sampler_name("DDPMScheduler") is None


def own_class(name, **options):
    return {**getattr(diffusers, name)(**options).config, "_class_name": name}


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        (own_class("MiniMaxH3Scheduler", shift=12.0), 12.0),
        (own_class("FlowMapEulerDiscreteScheduler", shift=5.0), 5.0),
        (own_class("DDIMScheduler", clip_sample=False), 1.0),
        (own_class("CogVideoXDDIMScheduler"), 1.0),
    ],
    ids=lambda value: value["_class_name"] if isinstance(value, dict) else "",
)
def test_a_scheduler_of_no_flow_model_is_its_models_only_one(config, shift, tmp_path):
    (entry,) = write_tables(tmp_path, config, [shift], [4, 9])
    assert (entry.name, entry.scheduler) == (config["_class_name"],) * 2
    scheduler = make_scheduler(entry.name, shift, config)
    counts_end = entry.name == "MiniMaxH3Scheduler"
    start = np.random.default_rng(0).standard_normal((1, 16, 3, 4), np.float32)
    expected = run_scheduler(scheduler, 9 + counts_end, start)
    table = SamplerTable.of(load_file(tmp_path / entry.file)["9"])
    np.testing.assert_array_equal(table.timesteps, np.asarray(scheduler.timesteps, np.float64))
    found = run_table(table, start)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ["DDPMScheduler", "EDMEulerScheduler", "DDIMScheduler"])
def test_what_draws_noise_scales_or_clips_has_no_table(name, tmp_path):
    assert write_tables(tmp_path, own_class(name), [1.0], [4]) == []


def test_latents_with_a_scheduler_of_their_own_have_its_shift(tmp_path):
    pipeline = tmp_path / "pipeline"
    for part, shift in (("scheduler", 12.0), ("audio_scheduler", 3.0)):
        diffusers.MiniMaxH3Scheduler(shift=shift).save_pretrained(pipeline / part)
    entries = bring_samplers(tmp_path, pipeline, [], ["latents", "audio_latents"], 1)
    assert [(e.latents, e.flow_shift) for e in entries] == [
        ("latents", 12.0),
        ("audio_latents", 3.0),
    ]
    video, audio = (load_file(tmp_path / e.file)["5"] for e in entries)
    levels = np.linspace(1, 0, 6)[1:5]
    for table, shift in ((video, 12.0), (audio, 3.0)):
        np.testing.assert_allclose(table[1:, 1], shift * levels / (1 + (shift - 1) * levels), 1e-6)
    shutil.rmtree(pipeline / "audio_scheduler")
    assert len(bring_samplers(tmp_path, pipeline, [], ["latents", "audio_latents"], 1)) == 1

# SPDX-License-Identifier: Apache-2.0
import distil
import pytest
import torch
from diffusers import WanPipeline
from train import take_step
from training_state import ResumeError

from freewheel.runtime.pipeline.schedulers import make_scheduler

TINY = {
    "iterations": 8,
    "batch": 2,
    "rank": 4,
    "learning_rate": 3e-3,
    "save_every": 4,
    "autocast": False,
}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("distil")
    distil.make_trajectories(model_folder, folder, count=2, substeps=1, autocast=False)
    return folder


def test_student_is_trained_at_the_timesteps_that_runs_have():
    scheduler = make_scheduler("distilled", distil.SHIFT)
    scheduler.set_timesteps(len(distil.STEP_LIST))
    sigmas = distil.listed_sigmas()
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in sigmas[:-1]])
    assert distil.listed_sigmas(3)[::3] == sigmas


def test_trajectories_begin_with_noise_and_end_with_the_pipelines_clip(
    work_dir, pipeline, model_folder
):
    latents, _ = distil.load_trajectories(work_dir)
    assert latents.shape == (2, 5, *distil.LATENT_SHAPE)
    assert latents[:, 0].std() == pytest.approx(1, abs=0.02)
    pipeline = WanPipeline(**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("steps_1000_750_500_250", distil.SHIFT)
    caption = str(distil.training_specs(1)[0].caption)
    known = {
        "height": 96,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": 4,
        "guidance_scale": distil.GUIDANCE_SCALE,
        "max_sequence_length": distil.TEXT_TOKENS,
        "latents": latents[:1, 0].clone(),
        "output_type": "latent",
    }
    by_euler = pipeline(caption, negative_prompt="", **known).frames
    # Another solver at the same timesteps: near, and much nearer than another noise's clip.
    distance = (by_euler - latents[:1, -1]).square().mean()
    assert distance < 0.2 * (latents[0, -1] - latents[1, -1]).square().mean()


@pytest.mark.nightly
def test_more_substeps_come_nearer_to_the_trajectory(pipeline, work_dir):
    latents, text = distil.load_trajectories(work_dir)
    empty = distil.encode_captions(pipeline, [""])

    def run(substeps):
        return distil.run_teacher(
            pipeline.transformer, latents[:1, 0], text[:1], empty, substeps=substeps
        )

    exact = run(8)
    errors = [(run(substeps) - exact).square().mean() for substeps in (1, 2, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_lora_changes_nothing_before_it_is_trained(model_folder, pipeline, work_dir):
    transformer, matrices = distil.make_student(model_folder, rank=4)
    latents, text = distil.load_trajectories(work_dir)
    call = (latents[:1, 0], torch.tensor([1000.0]), text[:1])
    with torch.no_grad():
        ours, theirs = (
            model(*call, return_dict=False)[0] for model in (transformer, pipeline.transformer)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    layers = {name.rpartition("/lora")[0] for name in matrices}
    assert len(layers) == 8 * 10 + 6  # ten layers of each block, six around them


def losses_of(transformer, work_dir):
    return distil.step_losses(transformer, *distil.load_trajectories(work_dir), autocast=False)


@pytest.mark.nightly
def test_training_reduces_the_loss_at_every_step_of_the_list(model_folder, work_dir):
    transformer, matrices = distil.make_student(model_folder, rank=8)
    optimizer = torch.optim.AdamW(matrices.parameters(), lr=1e-3, weight_decay=0.0)
    state = distil.TrainingState(matrices, optimizer, torch.Generator(), ema=[])
    before = losses_of(transformer, work_dir).detach()
    for _ in range(12):
        take_step(state, losses_of(transformer, work_dir).mean(), clip_norm=1.0)
    after = losses_of(transformer, work_dir).detach()
    assert (after < 0.8 * before).all(), (before, after)


@pytest.mark.nightly
def test_killed_training_resumes_and_its_lora_is_what_pipelines_load(
    model_folder, work_dir, tmp_path
):
    def kill(iteration, total, loss):
        if iteration == 5:
            raise KilledError

    def train(report=lambda *_: None, **others):
        return distil.train_student(model_folder, work_dir, report=report, **TINY | others)

    whole = train()
    (work_dir / "student.pt").unlink()
    with pytest.raises(KilledError):
        train(kill)
    with pytest.raises(ResumeError, match=r"'rank' is 4 but this run asks for 8"):
        train(rank=8)
    resumed = train()
    assert all(map(torch.equal, whole.ema, resumed.ema))

    distil.export(work_dir, model_folder, tmp_path / "four_steps.safetensors")
    distil.merge(tmp_path / "four_steps.safetensors", tmp_path / "merged", model_folder)
    student, matrices = distil.make_student(model_folder, rank=TINY["rank"])
    with torch.no_grad():
        for parameter, average in zip(matrices.parameters(), resumed.ema, strict=True):
            parameter.copy_(average)
    loaded = distil.load_pipeline(model_folder)
    before = losses_of(loaded.transformer, work_dir)
    loaded.load_lora_weights(tmp_path, weight_name="four_steps.safetensors")
    merged = distil.load_pipeline(tmp_path / "merged")
    wanted = losses_of(student, work_dir)
    assert (wanted < before).all()
    for transformer in (loaded.transformer, merged.transformer):
        torch.testing.assert_close(losses_of(transformer, work_dir), wanted, atol=0, rtol=2e-3)

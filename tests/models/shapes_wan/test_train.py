# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import train
from architecture import make_vae
from clips import training_specs
from training_state import ResumeError

TINY = {
    "iterations": 4,
    "batch": 1,
    "save_every": 2,
    "learning_rate": 1e-3,
    "long_text_share": 0.5,
    "clips": 2,
    "autocast": False,
}


class KilledError(Exception):
    pass


def ignore(iteration, total, loss):
    pass


def kill_at(iteration_to_stop_at):
    def report(iteration, total, loss):
        if iteration == iteration_to_stop_at:
            raise KilledError

    return report


@pytest.fixture
def work_dir(tmp_path, model_folder):
    train.adopt(model_folder, tmp_path)
    train.encode_training_clips(tmp_path, clips=2)
    return tmp_path


def weights(state):
    return {name: tensor.clone() for name, tensor in state.modules.state_dict().items()}


@pytest.mark.nightly
def test_killed_denoiser_training_resumes_to_the_same_weights(work_dir):
    whole = train.train_denoiser(work_dir, report=ignore, **TINY)
    (work_dir / "transformer.pt").unlink()

    with pytest.raises(KilledError):
        train.train_denoiser(work_dir, report=kill_at(3), **TINY)
    seen = []
    resumed = train.train_denoiser(work_dir, report=lambda i, *_: seen.append(i), **TINY)

    assert seen == [3, 4]
    assert weights(whole).keys() == weights(resumed).keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert all(map(torch.equal, whole.ema, resumed.ema))


@pytest.mark.nightly
def test_training_changes_the_weights_and_export_writes_them(work_dir):
    before = train.make_denoiser(work_dir).state_dict()
    state = train.train_denoiser(work_dir, report=ignore, **TINY)
    changed = [n for n, t in state.modules.state_dict().items() if not torch.equal(t, before[n])]
    assert len(changed) > 0.9 * len(before)

    train.export(work_dir, None)
    pipeline = train.WanPipeline.from_pretrained(work_dir / "export")
    names = [name for name, _ in state.modules["transformer"].named_parameters()]
    loaded = dict(pipeline.transformer.named_parameters())
    for name, average in zip(names, state.ema, strict=False):
        torch.testing.assert_close(loaded[name].detach(), average.half().float(), atol=0, rtol=0)


def test_other_settings_do_not_resume(work_dir):
    train.train_denoiser(work_dir, report=ignore, **TINY)
    with pytest.raises(ResumeError, match=r"'batch' is 1 but this run asks for 2"):
        train.train_denoiser(work_dir, report=ignore, **TINY | {"batch": 2})


def run_vae(path, report):
    torch.manual_seed(0)
    vae = make_vae()
    train.train_vae_phase(
        vae,
        path,
        phase=2,
        iterations=2,
        save_every=1,
        learning_rate=1e-3,
        report=report,
    )
    return vae.state_dict()


@pytest.mark.nightly
def test_killed_vae_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    def draw_small(phase, iteration, progress, generator):
        return torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1

    monkeypatch.setattr(train, "draw_vae_batch", draw_small)
    whole = run_vae(tmp_path / "whole.pt", ignore)
    with pytest.raises(KilledError):
        run_vae(tmp_path / "stopped.pt", kill_at(1))
    resumed = run_vae(tmp_path / "stopped.pt", ignore)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_interrupted_latents_are_completed(work_dir):
    (shard,) = sorted((work_dir / "latents").glob("*.safetensors"))
    before = train.load_moments(work_dir, clips=2)
    shard.unlink()
    train.encode_training_clips(work_dir, clips=2)
    assert torch.equal(train.load_moments(work_dir, clips=2), before)
    assert before.shape == (2, 32, 5, 12, 12)


def test_new_vae_gets_measured_statistics(tmp_path):
    torch.manual_seed(0)
    train.save_folder(tmp_path / "vae", make_vae().save_pretrained)
    train.encode_training_clips(tmp_path, clips=2)
    config = train.AutoencoderKLWan.load_config(tmp_path / "vae")
    mean = train.load_moments(tmp_path, clips=2)[:, :16].float()
    torch.testing.assert_close(torch.tensor(config["latents_std"]), mean.std((0, 2, 3, 4)))
    torch.testing.assert_close(torch.tensor(config["latents_mean"]), mean.mean((0, 2, 3, 4)))


def test_training_set_draws_normalised_latents_and_some_empty_captions(work_dir):
    training_set = train.TrainingSet(work_dir, clips=2)
    latents, tokens, mask = training_set.draw(64, torch.Generator().manual_seed(0))
    assert latents.shape == (64, 16, 5, 12, 12)
    assert 0.3 < latents.std() < 3
    empty = (mask.sum(1) == 1).sum().item()  # only the end token
    assert 0 < empty < 32
    texts = [str(spec.caption) for spec in training_specs(2)]
    expected = {tuple(row.tolist()) for row in train.tokenize([*texts, ""])[0]}
    assert {tuple(row.tolist()) for row in tokens} == expected


def test_learning_rates_hold_then_fall():
    assert train.cosine_tail(0.2, start=0.3) == train.linear_tail(0.5, start=0.6) == 1.0
    assert train.cosine_tail(1.0, start=0.3) == pytest.approx(0.02)
    assert train.linear_tail(1.0, start=0.6) == pytest.approx(0.03)


@pytest.mark.parametrize(("phase", "frames"), [(1, 1), (2, 9)])
def test_first_vae_batch_has_the_recipes_frames(phase, frames):
    clips = train.draw_vae_batch(phase, 0, 0.0, torch.Generator().manual_seed(0))
    assert clips.shape[1:] == (3, frames, 96, 96)


def test_folder_is_not_replaced_by_a_failed_write(tmp_path):
    target = tmp_path / "folder"
    train.save_folder(target, lambda out: (out / "old").write_text("old"))

    def fail(out):
        (out / "new").write_text("new")
        raise KilledError

    with pytest.raises(KilledError):
        train.save_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["old"]

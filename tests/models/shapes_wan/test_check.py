# SPDX-License-Identifier: Apache-2.0
import pytest
from check import Result, count_by_word, list_unmet_targets, measure_vae_psnr, read_clips, summarize
from clips import Caption, ClipSpec, render
from generate import Pair
from reader import Agreement, Reading

BLANK = Reading(color=None, background="gray", motion=None, shape=None, overlap=0.5)


def result(shape, motion, agreement):
    return Result(Pair(Caption("red", shape, motion, "gray"), seed=0), BLANK, agreement)


def test_summary_counts_each_word_and_leaves_out_motions_that_cannot_be_seen():
    yes = Agreement(color=True, motion=True, background=True, shape=True)
    no = Agreement(color=False, motion=False, background=True, shape=False)
    results = [
        result("circle", "spinning", yes),
        result("star", "spinning", no),
        result("star", "growing", yes),
        result("ring", "standing still", yes),
    ]
    summary = summarize(results)
    assert summary["color"] == summary["motion"] == summary["shape"] == 0.75
    assert summary["background"] == 1.0
    assert summary["readable_motion"] == 0.5
    assert summary["readable_motion_count"] == 2
    assert summary["overlap"] == 0.5


def test_counts_show_which_words_fail():
    yes = Agreement(color=True, motion=True, background=True, shape=True)
    no = Agreement(color=True, motion=False, background=True, shape=False)
    results = [
        result("star", "spinning", no),
        result("star", "growing", yes),
        result("ring", "spinning", yes),
    ]
    assert count_by_word(results) == {
        "by_shape": {"ring": "1/1", "star": "1/2"},
        "by_motion": {"growing": "1/1", "spinning": "0/1"},
    }


def test_unmet_targets_are_named():
    good = {"color": 0.95, "motion": 0.85, "background": 1.0}
    assert list_unmet_targets(good, mean_psnr=30.0) == []
    poor = good | {"motion": 0.84}
    assert list_unmet_targets(poor, mean_psnr=29.9) == ["motion", "vae_psnr"]


def test_true_clip_agrees_and_wrong_caption_does_not():
    caption = Caption("yellow", "star", "shrinking", "brown")
    clip = render(ClipSpec(caption, 0.0, 0.0, 0.35, 0.5))
    frames = ((clip + 1) / 2).permute(1, 2, 3, 0).numpy()
    wrong = Caption("yellow", "star", "growing", "brown")
    true, false = read_clips([Pair(caption, 0), Pair(wrong, 0)], [frames, frames])
    assert true.agreement == Agreement(color=True, motion=True, background=True, shape=True)
    assert not false.agreement.motion


def test_vae_reconstructs_fresh_clips(pipeline):
    psnr = measure_vae_psnr(pipeline.vae, count=4)
    assert len(set(psnr)) == 4
    # 64 clips average over 30 dB; four of them may be the harder ones.
    assert 27 < sum(psnr) / 4 < 60


def test_untrained_vae_misses_the_target():
    from architecture import make_vae

    (psnr,) = measure_vae_psnr(make_vae().eval(), count=1)
    assert psnr < 20


@pytest.mark.parametrize("option", ["--json", "--tuning", "--draw", "--guidance"])
def test_help_lists_options(option):
    import check
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(check.main)
    output = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["--help"]
    )
    assert output.exit_code == 0
    assert option in output.output

"""Inner products taken while runs go by: they tell the error of a mix before it is used."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import SolvedConfig, SolvedSchedule
from freewheel.runtime.pipeline.generate import Generator
from freewheel.tuning.gram import GramRecorder

STEPS, GUIDANCE = 24, 3.0


@pytest.fixture(scope="module")
def recorded(generator: Generator, request_of: Any) -> tuple[GramRecorder, list[torch.Tensor]]:
    """Two runs' sums, and the last run's residuals of the conditional branch."""
    recorder = GramRecorder(generator.transformer.session.model, window=4)
    kept: list[torch.Tensor] = []
    seen = recorder.on_step

    def watch(record: Any, dims: Any) -> None:
        if record.branch == "cond":
            kept.append(record.residual.clone())
        seen(record, dims)

    recorder.on_step = watch  # type: ignore[method-assign]
    for seed in (1, 2):
        kept.clear()
        request = request_of(CacheSetting(), steps=STEPS, seed=seed)
        generator.generate(request, recorder=recorder)
    return recorder, kept


def test_changes_and_ratios_are_those_of_the_residuals(recorded: Any) -> None:
    recorder, kept = recorded
    expected = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(kept)]
    assert recorder.changes["cond"][1] == pytest.approx(expected, rel=1e-5)
    ratios = [float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(kept)]
    assert recorder.ratios["cond"][1] == pytest.approx(ratios, rel=1e-5)
    assert [len(r) for r in recorder.changes["uncond"]] == [STEPS - 1] * 2


def test_sums_are_whole_symmetric_and_zero_before_the_first_step(recorded: Any) -> None:
    grams = recorded[0].grams()
    assert grams.branches == ("cond", "uncond")
    assert grams.runs == 2
    assert grams.values.shape == (STEPS, 10, 10)
    np.testing.assert_allclose(grams.values, np.swapaxes(grams.values, 1, 2), rtol=1e-9, atol=1e-12)
    assert (grams.values[0][1:5, :] == 0).all()
    assert (np.diagonal(grams.values[5]) > 0).all()


def test_gram_tells_the_output_error_of_a_reused_step(
    generator: Generator, request_of: Any, recorded: Any
) -> None:
    """Hold one residual for one step: the output's error is the one that the sums foretell."""
    transformer = generator.transformer
    recorder = GramRecorder(transformer.session.model, window=4)
    generator.generate(request_of(CacheSetting(), steps=STEPS, seed=5), recorder=recorder)
    grams = recorder.grams()
    guided = np.zeros(10)
    guided[1], guided[6] = GUIDANCE, 1 - GUIDANCE

    outputs: dict[str, list[torch.Tensor]] = {"off": [], "hold": []}
    step = transformer.session.step

    def reuse_at(t: int) -> CacheSetting:
        held = SolvedSchedule(computed=[i for i in range(STEPS) if i != t], mix=[[1.0]])
        return SolvedConfig(feature_caching="Solved", infer_steps=STEPS, schedules=[held]).setting()

    for t in (9, 14):
        for name, setting in (("off", CacheSetting()), ("hold", reuse_at(t))):
            seen: list[torch.Tensor] = []

            def watch(branch: str, index: int, inputs: Any, seen: Any = seen, t: int = t) -> Any:
                output = step(branch, index, inputs)
                if index == t:
                    seen.append(output.clone())
                return output

            transformer.session.step = watch
            try:
                generator.generate(request_of(setting, steps=STEPS, seed=5))
            finally:
                transformer.session.step = step
            cond, uncond = seen
            outputs[name] = [uncond + GUIDANCE * (cond - uncond)]
        error = float((outputs["hold"][0] - outputs["off"][0]).square().mean())
        assert guided @ grams.values[t] @ guided == pytest.approx(error, rel=0.2)

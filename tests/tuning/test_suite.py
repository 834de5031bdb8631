# SPDX-License-Identifier: Apache-2.0
"""A sampler replayed with the model's answer to drift: what it must reproduce exactly, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from freewheel.bundle.sampler_table import SamplerTable
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.tuning.suite import LONGEST_LAG, RecordedSample, Suite, load_suite
from freewheel.tuning.trace import Trace

STEPS, ELEMENTS = 6, 5
EVERY_OTHER = CacheSetting(policy="taylorseer", parameters={"interval": 2, "order": 1})


def made(response: float = 0.3, ends: float = 0.1) -> tuple[Suite, np.ndarray[Any, Any]]:
    """Return a suite of a linear world, and its residuals [steps, elements].

    Outputs are residuals plus ``ends`` of the sample; a computed residual follows the sample by
    ``response − ends``.
    """
    random = np.random.default_rng(0)
    residuals = random.standard_normal((STEPS, ELEMENTS)).astype(np.float32)
    moves = np.zeros((STEPS, LONGEST_LAG + 1, ELEMENTS), np.float32)
    for step in range(STEPS):
        moves[step, 0] = residuals[step]
        for lag in range(1, step + 1):
            moves[step, lag] = residuals[step - lag] - residuals[step]
    arrays = {
        "timesteps": np.linspace(900, 100, STEPS).astype(np.float32),
        "branches": np.array(["cond"]),
        "cond/residual": residuals[:, None, :],
        "cond/computed": np.ones(STEPS, bool),
    }
    levels = np.linspace(1, 0, STEPS + 1)
    table = SamplerTable(
        arrays["timesteps"].astype(float),
        levels[:-1],
        np.ones((STEPS, 1)),
        np.diff(levels)[:, None],
    )
    drifts = random.standard_normal((STEPS, 3 * ELEMENTS, ELEMENTS)).astype(np.float32)
    answers = drifts[:, :, None, :] * np.array([response, ends], np.float32)[:, None]
    runs = [RecordedSample(Trace(arrays), {"cond": moves}, drifts, {"cond": answers}, 2.0)]
    return Suite({"prompts": ["x"]}, runs, table, {"cond": 1.0}), residuals


@pytest.mark.parametrize(("response", "ends"), [(0.0, 0.0), (0.3, 0.1), (-0.5, 0.2)])
def test_in_a_linear_world_the_suite_tells_what_a_real_run_does(
    response: float, ends: float
) -> None:
    suite, residuals = made(response, ends)
    exact = drifted = np.zeros(ELEMENTS)
    held: list[np.ndarray[Any, Any]] = []
    for step in range(STEPS):
        if step % 2 == 0:
            held.insert(0, residuals[step] + (response - ends) * (drifted - exact))
            used = held[0]
        else:
            used = held[0] if len(held) == 1 else 1.5 * held[0] - 0.5 * held[1]
        rise = suite.table.b[step, 0]
        ahead = exact + rise * (residuals[step] + ends * exact)
        drifted, exact = drifted + rise * (used + ends * drifted), ahead
    expected = 10 * np.log10(np.square(drifted - exact).mean() / 2.0)
    found = suite.foretell(EVERY_OTHER)
    assert found.computed_steps == STEPS / 2
    assert found.mean == found.worst == pytest.approx(expected, abs=0.05)


def test_what_computes_every_step_does_not_drift() -> None:
    suite, _ = made()
    assert suite.foretell(CacheSetting()).mean == -100.0


def test_a_suite_is_read_back(tmp_path: Path) -> None:
    suite, _ = made()
    path = tmp_path / "suite.npz"
    suite.save(path)
    again = load_suite(path)
    assert again.about["prompts"] == ["x"]
    assert again.guidance == suite.guidance
    assert again.foretell(EVERY_OTHER).mean == pytest.approx(
        suite.foretell(EVERY_OTHER).mean, abs=0.01
    )


def test_what_runs_share_is_written_once_and_read_by_each(tmp_path: Path) -> None:
    suite, _ = made()
    twice = Suite(suite.about, [*suite.runs, *suite.runs], suite.table, suite.guidance)
    twice.save(tmp_path / "suite.npz")
    with np.load(tmp_path / "suite.npz") as file:
        names = [n for n in file.files if n.endswith("cond/residual")]
    assert names == ["shared/cond/residual"]
    again = load_suite(tmp_path / "suite.npz")
    assert [r.trace.arrays.keys() for r in again.runs] == [
        r.trace.arrays.keys() for r in twice.runs
    ]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", None])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "suite.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="is not a suite of recorded runs"):
        load_suite(path)

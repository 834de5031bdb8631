"""Traces: what a file holds, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from freewheel.core.errors import OutputError, RequestError
from freewheel.policies.schedule import Schedule
from freewheel.tuning.trace import Trace, load_trace


def test_trace_holds_what_the_format_says(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    trace.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    loaded = load_trace(path)
    assert loaded.branches == ["cond", "uncond"]
    shapes = {n: a.shape for n, a in loaded.arrays.items() if n.startswith("cond/")}
    assert shapes == {
        "cond/temb": (20, 256),
        "cond/timestep_proj": (20, 1536),
        "cond/modulated_input": (20, 72, 256),
        "cond/first_block_residual": (20, 72, 256),
        "cond/latents": (20, 32, 12, 12),
        "cond/filtered_latents": (20, 32, 12, 12),
        "cond/model_output": (20, 32, 12, 12),
        "cond/feature": (20, 72, 256),
        "cond/residual": (20, 72, 256),
        "cond/computed": (20,),
    }
    assert {
        n: int(loaded.arrays[n]) for n in ("frames", "tokens_per_frame", "height", "width")
    } == {"frames": 2, "tokens_per_frame": 36, "height": 6, "width": 6}
    assert loaded.arrays["timesteps"].shape == loaded.arrays["sigmas"].shape == (20,)
    assert loaded.schedule.sigmas == tuple(loaded.arrays["sigmas"].tolist())
    assert all(a.dtype in (np.float32, np.bool_) for n, a in loaded.arrays.items() if "/" in n)


def test_a_trace_without_noise_levels_has_a_flow_models(trace: Trace) -> None:
    arrays = {n: a for n, a in trace.arrays.items() if n != "sigmas"}
    timesteps = trace.arrays["timesteps"].tolist()
    assert Trace(arrays).schedule == Schedule.of(timesteps)


def test_residual_is_body_output_minus_input(trace: Trace) -> None:
    """The residual changes from step to step and is not the feature."""
    residual = trace.get("cond", "residual")
    change = np.abs(np.diff(residual, axis=0)).mean() / np.abs(residual).mean()
    assert 0.01 < change < 0.5
    assert not np.allclose(residual, trace.get("cond", "feature"))


@pytest.mark.parametrize(
    "damage", ["missing", "text", "truncated", "pickle", "ragged", "sigmas", "empty"]
)
def test_files_that_are_no_trace_are_refused(trace: Trace, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "trace.npz"
    if damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        trace.save(path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "pickle":
        np.savez(path, timesteps=np.array([{}], dtype=object), branches=np.array(["cond"]))
    elif damage == "ragged":
        arrays = {**trace.arrays, "cond/residual": trace.get("cond", "residual")[:5]}
        np.savez(path, **arrays)
    elif damage == "sigmas":
        np.savez(path, **{**trace.arrays, "sigmas": np.ones(3)})
    elif damage == "empty":
        np.savez(path, other=np.zeros(1))
    with pytest.raises(RequestError, match=r"trace.npz.*; record"):
        load_trace(path)


def test_unwritable_place_is_one_error(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/trace.npz.*can't be written.*choose"):
        trace.save(tmp_path / "file" / "trace.npz")
    trace.save(tmp_path / "new" / "trace.npz")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["trace.npz"]


@pytest.mark.parametrize("kind", ["npy", "pickle", "video", "objects"])
def test_what_is_no_trace_is_said_without_advice_to_unpickle(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "trace.npz"
    with path.open("wb") as stream:
        if kind == "npy":
            np.save(stream, np.zeros(3))
        elif kind == "pickle":
            pickle.dump({"a": 1}, stream)
        elif kind == "video":
            stream.write(b"\0\0\0 ftypisom")
        else:
            np.savez(stream, timesteps=np.array([{}], dtype=object), branches=np.array(["cond"]))
    says = "holds Python objects" if kind == "objects" else "is no .npz file"
    with pytest.raises(RequestError, match=says) as caught:
        load_trace(path)
    assert "pickle" not in str(caught.value)

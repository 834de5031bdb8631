"""One bundle, one video: the same request through Python, freewheel-run, the C ABI and Triton."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="run by 'make test-triton'")

from client import ask

pytestmark = pytest.mark.triton


def test_a_request_gives_the_same_bits_through_every_door(server, prepared: Path) -> None:
    """The request says its prompt, and sometimes a policy; all else is the bundle's."""
    expected = np.load(prepared / "expected" / "latents.npz")
    requests = json.loads((prepared / "expected" / "requests.json").read_text())
    states = {
        name: np.load(prepared / "expected" / f"{branch}.npy")
        for name, branch in {"text_states": "cond", "negative_text_states": "uncond"}.items()
    }
    for name, (cache, overrides) in requests.items():
        parameters = {**overrides, **({"policy": cache} if cache else {})}
        answer = ask(server.grpc, "doors", tensors=states, **parameters)
        assert answer.summary["seed"] == 42
        assert answer.summary["steps"] == (4 if cache == "listed" else 50)
        for door in ("Python", "freewheel-run", "C ABI"):
            np.testing.assert_array_equal(answer.latents[None], expected[f"{name}/{door}"], door)
    assert len(requests) == len(expected.files) // 3 >= 5

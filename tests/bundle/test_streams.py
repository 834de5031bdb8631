# SPDX-License-Identifier: Apache-2.0
"""What belongs to one of several things that a model samples is found by its name."""

from __future__ import annotations

import pytest

from freewheel.bundle.streams import HIDDEN, HISTORY, LATENTS, beside, check_samples_one
from freewheel.core.errors import RequestError


def test_what_belongs_together_begins_alike() -> None:
    assert beside("audio_hidden", HIDDEN, HISTORY) == "audio_history"
    assert beside("hidden", HIDDEN, HISTORY) == "history"
    assert beside("audio_history", HISTORY, LATENTS) == "audio_latents"


def test_several_things_are_refused_where_one_is_handled() -> None:
    check_samples_one(["latents"], "bundle 'x'", "ranks trade one output a branch")
    with pytest.raises(RequestError) as caught:
        check_samples_one(
            ["latents", "audio_latents"], "bundle 'x'", "ranks trade one output a branch"
        )
    assert caught.value.where == "bundle 'x'"
    assert (
        caught.value.what
        == "samples latents, audio_latents at once, and ranks trade one output a branch"
    )
    assert "attach the bundle to its diffusers pipeline" in caught.value.hint

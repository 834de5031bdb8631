# SPDX-License-Identifier: Apache-2.0
"""What a pipeline is asked for to be watched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers

from freewheel.compiler.cut.watch import LONGER, usual_calls


def test_a_pipeline_of_sound_is_asked_for_seconds_and_prompts() -> None:
    pipe: Any = SimpleNamespace(__call__=diffusers.LongCatAudioDiTPipeline.__call__)
    first, others = usual_calls(pipe, "x")
    assert first == {"prompt": "x", "guidance_scale": 1.0, "audio_duration_s": 10.0}
    assert others == {
        "batch": {"prompt": ["x", "x"]},
        "frames": {"audio_duration_s": 20.0},
        "text_tokens": {"prompt": ", and ".join("x" * LONGER)},
    }


def test_a_batch_is_of_several_prompts_where_a_pipeline_takes_them() -> None:
    """CogVideoX's takes a number of videos too, and makes one."""
    pipe: Any = SimpleNamespace(__call__=diffusers.CogVideoXPipeline.__call__)
    assert usual_calls(pipe, "x")[1]["batch"] == {"prompt": ["x", "x"]}

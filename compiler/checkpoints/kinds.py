# SPDX-License-Identifier: Apache-2.0
"""Tell a file that holds no transformer by the names of its tensors: an adapter, a VAE, a text encoder."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ...core.errors import CheckpointError

__all__ = ["refuse_other_kinds"]

BY_LORA = "build the checkpoint that it was made for, and give it to run or attach: --lora FILE:1.0"
BY_PIPELINE = "give the transformer's file as MODEL, and the diffusers folder that has this part by --pipeline"

KINDS: tuple[tuple[str, str, str], ...] = (
    (r"\.(lora_[AB]|lora_(up|down)|lokr_w[12]|hada_w[12]_[ab]|diff|diff_b|dora_scale)(\.|$)",
     "an adapter", BY_LORA),
    (r"^(vae\.|first_stage_model\.)?(decoder|encoder)\.(conv1|conv_in|middle|mid_block|mid|up_blocks)\.",
     "a VAE", BY_PIPELINE),
    (r"^(shared\.weight|encoder\.block\.\d+\.layer\.|blocks\.\d+\.pos_embedding\.|token_embedding\.weight)",
     "a T5 text encoder", BY_PIPELINE),
    (r"^(cond_stage_model\.)?(text_model\.|model\.layers\.\d+\.self_attn\.|model\.embed_tokens\.)",
     "a text encoder", BY_PIPELINE),
    (r"^(visual\.|vision_model\.)", "an image encoder", BY_PIPELINE),
    (r"^(control_|controlnet_)", "a ControlNet", "ControlNets are not built; take the plain model"),
)  # fmt: skip
"""Pattern of a tensor's name → what has it, and what to do."""


def refuse_other_kinds(names: Collection[str], where: Path) -> None:
    """Refuse a file by what it is, if its tensors' names tell.

    Args:
        names: Names of tensors in which no transformer was recognised.
        where: The file.

    Raises:
        CheckpointError: it is another part of a pipeline, or an adapter.
    """
    for pattern, kind, hint in KINDS:
        name = next((n for n in names if re.search(pattern, n)), None)
        if name is not None:
            raise CheckpointError(str(where), f"is {kind}, by its tensor '{name}'", hint)

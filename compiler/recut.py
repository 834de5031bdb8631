# SPDX-License-Identifier: Apache-2.0
"""Cut a model again from its bundle, for what needs its PyTorch modules: `verify` and `inspect`."""

from __future__ import annotations

from ..bundle.reader import Bundle
from .families import Cut, family_of

__all__ = ["cut_of"]


def cut_of(bundle: Bundle) -> Cut:
    """Cut the model that a bundle was built from; its modules are on ``meta``.

    Raises:
        CheckpointError: no family of this Freewheel cuts it.
    """
    manifest = bundle.manifest
    family = family_of(manifest.checkpoint.transformer_class, f"{bundle.folder}/manifest.json")
    tensors = manifest.tensors
    return family.cut(
        manifest.checkpoint.config,
        manifest.precision,
        lambda name: tensors[name].dtype if name in tensors else "float32",
    )

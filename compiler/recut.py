# SPDX-License-Identifier: Apache-2.0
"""Cut a model again from its manifest, for what needs its PyTorch modules: `verify` and `inspect`."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from .families import Cut, family_of

__all__ = ["cut_of"]


def cut_of(manifest: Manifest) -> Cut:
    """Cut the model that a bundle was built from; its modules are on ``meta``.

    Raises:
        CheckpointError: no family of this Freewheel cuts it.
    """
    family = family_of(manifest.checkpoint.transformer_class, "manifest.json")
    tensors = manifest.tensors
    return family.cut(
        manifest.checkpoint.config,
        manifest.precision,
        lambda name: tensors[name].dtype if name in tensors else "float32",
    )

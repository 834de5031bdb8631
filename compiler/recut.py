# SPDX-License-Identifier: Apache-2.0
"""Give the cut that a bundle was built of, for what needs its PyTorch modules or its dimensions."""

from __future__ import annotations

from ..bundle.reader import Bundle
from .cut.document import CONSTANTS, CUT, DOCUMENT, read_cut
from .families import Cut, family_of

__all__ = ["cut_of"]

FILES = {f"{CUT}/{name}" for name in (DOCUMENT, CONSTANTS)}


def cut_of(bundle: Bundle) -> Cut:
    """Read a bundle's cut, or cut its model again by hand; its modules are on ``meta``.

    Raises:
        BundleError: the bundle's cut can't be read.
        CheckpointError: no family of this Freewheel cuts the model.
    """
    manifest = bundle.manifest
    if manifest.files.keys() >= FILES:  # those that opening the bundle has checked
        return read_cut(bundle.folder / CUT)
    family = family_of(manifest.checkpoint.transformer_class, "manifest.json")
    tensors = manifest.tensors
    return family.cut(
        manifest.checkpoint.config,
        manifest.precision,
        lambda name: tensors[name].dtype if name in tensors else "float32",
    )

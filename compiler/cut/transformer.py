# SPDX-License-Identifier: Apache-2.0
"""Cut the transformer that a config describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch

from ...bundle.store import NO_STORE, Store
from ...core.dtypes import Precision
from ...core.errors import CheckpointError
from ..checkpoints.completeness import check_keys
from ..code_version import code_version
from .declare import declare
from .declared import Cut, StoredDtype
from .document import read_cut, write_cut
from .row import Row

__all__ = ["cut_transformer", "on_meta"]


def cut_transformer(
    row: Row,
    config: Mapping[str, Any],
    precision: Precision,
    stored: StoredDtype,
    store: Store = NO_STORE,
) -> Cut:
    """Cut a transformer, or read what an earlier build with equal dtypes found.

    Args:
        row: What the transformer takes.
        config: As its ``config.json`` says.
        precision: Precision of ``body``.
        stored: Checkpoint tensor name → stored dtype.
        store: Where cuts are kept.

    Raises:
        CheckpointError: the class can't be made of that config, or is of a kind that the row refuses.
        ExportError: it can't be traced, or a bundle has no word for something in its cut.
    """
    for key, (value, kind, remedy) in row.refused.items():
        if config.get(key) and value in (None, config[key]):
            raise CheckpointError(f"transformer/config.json, '{key}'", kind, remedy)
    model = on_meta(getattr(diffusers, row.model), config)
    own = dict(model.config)
    tensors = list(model.state_dict())

    def write(folder: Path) -> None:
        cut = declare(row, type(model), own, precision, stored)
        write_cut(replace(cut, unread=frozenset(tensors) - cut.weights().keys()), folder)

    about = ["cut", code_version(), repr(row), own, precision, {n: stored(n) for n in tensors}]
    with TemporaryDirectory() as scratch:
        store.bring(about, Path(scratch) / "cut", write)
        return read_cut(Path(scratch) / "cut")


def on_meta(model_class: Any, config: Mapping[str, Any]) -> Any:
    """Return a diffusers transformer on ``meta``, which no weight is loaded for.

    Raises:
        CheckpointError: the class can't be made of that config, or would drop some of its keys.
    """
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    check_keys(config, known, "transformer/config.json")
    try:
        with torch.device("meta"):
            return model_class.from_config(dict(config)).eval()
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            "transformer/config.json",
            f"has values that '{model_class.__name__}' can't be made of: {error}",
            "it belongs to another model; fetch it again",
        ) from error

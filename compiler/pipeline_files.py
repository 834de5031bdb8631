# SPDX-License-Identifier: Apache-2.0
"""Bring a diffusers pipeline's other parts into a bundle, so that it runs by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..bundle.files import link_or_none
from ..bundle.manifest import PipelineEntry
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.folders import linked_names, pipeline_folders

__all__ = ["bring_pipeline"]

SMALL_FILE_BYTES = 64 << 20


def bring_pipeline(checkpoint: Checkpoint, folder: Path) -> PipelineEntry:
    """Link the pipeline's other parts into the bundle, so that it runs by itself.

    Where the file system can't link, small files are copied and the manifest names the source of
    the rest.
    """
    if checkpoint.pipeline is None:
        return PipelineEntry()
    target = folder / "pipeline"
    target.mkdir()
    shutil.copyfile(checkpoint.pipeline / "model_index.json", target / "model_index.json")
    (target / "transformer").mkdir()
    config = json.dumps(checkpoint.config, indent=2)
    (target / "transformer" / "config.json").write_text(config, encoding="utf-8")
    for part in pipeline_folders(checkpoint.pipeline):
        for source, name in linked_names(checkpoint.pipeline / part, checkpoint.variant).items():
            place = target / part / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if link_or_none(source, place) is not None:
                continue
            if source.stat().st_size > SMALL_FILE_BYTES:
                shutil.rmtree(target)
                return PipelineEntry(source=str(checkpoint.pipeline.resolve()))
            shutil.copyfile(source, place)
    return PipelineEntry(folder="pipeline")

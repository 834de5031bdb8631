# SPDX-License-Identifier: Apache-2.0
"""Engines of TensorRT-RTX of a class, as wide as its released model, and the attentions fused in them.

Heads of 4 and 8 channels, which small models have, are in no fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from released_configs import RELEASED

from freewheel.bundle.dims import divisor, least
from freewheel.bundle.manifest import ConfigEntry, EngineSetEntry, GenerationDefaults, GraphEntry
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.row import Row
from freewheel.compiler.cut.transformer import cut_transformer
from freewheel.compiler.defaults import resolve_configs
from freewheel.compiler.engine_layers import attention_of
from freewheel.compiler.engines import compile_graphs
from freewheel.compiler.graphs.write import write_graphs
from freewheel.compiler.profiles import BuildSizes, Range, dim_ranges, profiles_of
from freewheel.core.errors import FreewheelError
from freewheel.core.progress import Silent
from freewheel.engines.base import Target
from freewheel.engines.record import EngineRecord
from freewheel.engines.tensorrt import TensorRTRTX
from freewheel.policies.setting import CacheSetting

OFF = {"off": ConfigEntry(cache=CacheSetting(), generation=GenerationDefaults(text_tokens=64))}
LADA = Target(compute_capabilities=("8.9",))
LATENTS = (16, 64, 64)
"""Smallest, usual and largest height and width of the latents."""
PATCHES = (1, 8, 8)
"""As many patches in time."""

ENDED = "TensorRT-RTX ends the process"


def engines_of(row: Row) -> str:
    """Compile every graph of a class's cut; say how many attentions are fused, or why not all compile.

    TensorRT-RTX may end the process, so it has one of its own.
    """
    with ProcessPoolExecutor(1, get_context("fork")) as other:
        try:
            return other.submit(_compile, row).result()
        except BrokenProcessPool:
            return ENDED


def _compile(row: Row) -> str:
    try:
        cut = cut_transformer(row, RELEASED.get(row.model, {}), "bfloat16", lambda name: "bfloat16")
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "graphs").mkdir()
            graphs = write_graphs(cut.segments, cut.example_dims, folder, Silent())
            ranges = dim_ranges(cut, _sizes_of(cut), resolve_configs(OFF, None, cut), None)
            profiles = profiles_of(graphs, {}, cut, ranges)
            engines = compile_graphs(
                TensorRTRTX(), graphs, folder, LADA, Silent(), profiles=profiles
            )
            return _fused(folder, graphs, engines)
    except FreewheelError as refusal:
        return f"refused: {refusal.where}: {refusal.what}"


def _sizes_of(cut: Cut) -> BuildSizes:
    """Return pixels and frames for latents of `LATENTS` and `PATCHES`."""
    by_time, by_space = cut.latent_scale
    pixels = _range(side * by_space for side in LATENTS)
    patch, fewest = divisor(cut.dims, "frames"), least(cut.sums, "frames")
    latents = (max(count * patch, fewest) for count in PATCHES)
    frames = _range((count - 1) * by_time + 1 for count in latents)
    return BuildSizes(height=pixels, width=pixels, frames=frames, batch=(1, 1, 2))


def _range(sizes: Iterable[int]) -> Range:
    smallest, usual, largest = sizes
    return smallest, usual, largest


def _fused(folder: Path, graphs: Mapping[str, GraphEntry], engines: EngineSetEntry) -> str:
    """Count the attentions of graphs in bfloat16: float32, which the prompt's are in, has no fused kernel."""
    found = []
    for name, graph in graphs.items():
        if graph.precision == "bfloat16":
            counts = attention_of(EngineRecord.read(folder / engines.files[name]).details)
            assert counts is not None, "TensorRT tells its layers"
            found.append((counts["fused"], counts["nodes"]))
    return f"{sum(fused for fused, _ in found)} of {sum(nodes for _, nodes in found)}"

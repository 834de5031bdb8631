# SPDX-License-Identifier: Apache-2.0
"""What cutting blocks at their attentions costs where one rank has the whole sequence.

    python benchmarks/synthetic.py wan2.1-t2v-1.3b --layers 2 --out out/wan-1.3b-2
    freewheel build out/wan-1.3b-2 --out out/wan-1.3b-2-bundle --policy off --sequence-parallel
    python benchmarks/sequence_cut.py out/wan-1.3b-2-bundle

Counts nodes, calls and bytes between parts, then times computed steps of both forms in turn in one
process. One rank exchanges nothing and copies nothing, so what is left is the cut.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from page import OUT, Out, Table, write
from real_size import latents_of, prompt_states
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.distributed.ranks import Ranks
from freewheel.runtime.distributed.sequence import SharedModel
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session


class OneRank(Ranks):
    """A job of one process, which tells nobody anything."""

    def __init__(self) -> None:
        self.rank, self.size, self.members = 0, 1, (0,)

    def tell(self, note: Mapping[str, Any], doing: str) -> list[dict[str, Any]]:
        """Return the own note."""
        return [dict(note)]

    def totals(self, values: Sequence[float], doing: str) -> list[list[float]]:
        """Return the own numbers."""
        return [list(values)]


def counted(bundle: Bundle) -> list[tuple[str, int, int, int]]:
    """Return of every block's template: its name, its nodes, those of its parts, calls."""
    sequence = bundle.manifest.sequence
    assert sequence is not None, "built with --sequence-parallel"

    def nodes(graph: str) -> int:
        return len(onnx.load(bundle.graph_path(graph), load_external_data=False).graph.node)

    return [
        (block, nodes(block), sum(nodes(part.graph) for part in parts), len(parts))
        for block, parts in sequence.blocks.items()
    ]


def compare(
    bundle: Bundle, size: tuple[int, int, int], rounds: int, backend: str | None
) -> tuple[list[list[float]], float, int]:
    """Return seconds of computed steps of both forms, how far they are apart, bytes between parts."""
    models = [Model(bundle, backend), SharedModel(bundle, backend, ranks=OneRank())]
    sessions = [Session(model) for model in models]
    states = prompt_states(sessions[0])
    for session in sessions:
        session.set_prompt("cond", states)
    latents = latents_of(sessions[0], size)
    taken: list[list[float]] = [[], []]
    outputs: list[Tensor] = [torch.zeros(0), torch.zeros(0)]
    for turn in range(rounds + 1):  # the first warms up
        for which in (0, 1) if turn % 2 else (1, 0):
            session = sessions[which]
            session.begin(torch.tensor([500.0]), CacheSetting())
            outputs[which] = session.step("cond", 0, {"latents": latents}).clone()
            if turn:
                taken[which].append(session.statistics.seconds["body"])
            session.statistics.seconds.clear()
    apart = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    shared = models[1]
    assert isinstance(shared, SharedModel), "the second of them"
    return taken, float(apart), shared.buffer_bytes


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder, built with --sequence-parallel.")],
    out: Out = OUT,
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    frames: Annotated[int, typer.Option(help="Latent frames.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed steps of each form.")] = 15,
    backend: Annotated[str | None, typer.Option(help="Of the bundle; default: its first.")] = None,
    count_only: Annotated[bool, typer.Option(help="Count, and time nothing.")] = False,
) -> None:
    """Count, and measure."""
    torch.manual_seed(0)
    opened = Bundle(bundle)
    counts = counted(opened)
    parts: list[Table | str] = [Table(["block", "nodes", "of its parts", "calls"], counts)]
    figures: dict[str, Any] = {"counts": counts}
    if not count_only:
        (whole, cut), apart, between = compare(opened, (height, width, frames), rounds, backend)
        ratios = [c / w for c, w in zip(cut, whole, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures |= {"whole": whole, "cut": cut, "apart": apart, "bytes_between_parts": between}
        row = [
            f"{statistics.median(whole):.4f}",
            f"{statistics.median(cut):.4f}",
            f"{middle:.3f}",
            f"{low:.3f}–{high:.3f}",
        ]
        columns = ["body, s: whole", "cut", "cut / whole, median", "quartiles"]
        text = f"Bytes between parts: {between:,}; results apart: {apart:.1e}."
        parts.append(Table(columns, [row], text, texts=0))
    typer.echo(write(out, "sequence_cut", "Blocks cut at their attentions", figures, *parts))


if __name__ == "__main__":
    typer.run(main)

"""Let builds take graphs that another build has traced, since tracing is most of their time."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.manifest import GraphEntry
from freewheel.bundle.reader import Bundle
from freewheel.compiler import build as building


@contextmanager
def taking_traced(bundle: Bundle, graphs: Collection[str]) -> Iterator[None]:
    """Take these graphs and every policy from `bundle`; builds inside trace only what else they need."""
    entries = bundle.manifest.graphs
    trace = building.write_graphs

    def take(name: str, folder: Path) -> GraphEntry:
        shutil.copyfile(bundle.graph_path(name), folder / entries[name].file)
        return entries[name]

    def write_graphs(
        segments: Any, dims: Any, folder: Path, progress: Any, dump: Path | None = None
    ) -> dict[str, GraphEntry]:
        taken = {s.name: take(s.name, folder) for s in segments if s.name in graphs}
        rest = [s for s in segments if s.name not in taken]
        return taken | trace(rest, dims, folder, progress, dump)

    def write_decide_graph(policy: Any, folder: Path) -> GraphEntry:
        return take(f"decide.{policy.spec.name}", folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "write_graphs", write_graphs)
        patch.setattr(building, "write_decide_graph", write_decide_graph)
        yield

# SPDX-License-Identifier: Apache-2.0
"""A bundle's model cut again is the model that was built."""

from __future__ import annotations

import shutil
from pathlib import Path

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.document import CUT, DOCUMENT
from freewheel.compiler.graphs.write import io_entries
from freewheel.compiler.recut import cut_of


def test_the_cut_declares_what_the_manifest_does(tiny_bundle: Bundle) -> None:
    manifest, cut = tiny_bundle.manifest, cut_of(tiny_bundle)
    assert cut.history_dtype == manifest.history_dtype
    assert [s.count for s in cut.stages] == [s.count for s in manifest.stages]
    for segment in cut.segments:
        kept = {n: s for n, s in segment.outputs.items() if n not in segment.dropped}
        assert io_entries(kept) == manifest.graphs[segment.name].outputs
    assert all(p.device.type == "meta" for s in cut.segments for p in s.module.parameters())


def test_a_cut_that_the_manifest_does_not_list_is_not_read(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.folder, tmp_path / "copy")
    (tmp_path / "copy" / CUT).mkdir()
    (tmp_path / "copy" / CUT / DOCUMENT).symlink_to("/etc/hostname")
    found = cut_of(Bundle(tmp_path / "copy"))
    assert found.weights() == cut_of(tiny_bundle).weights()

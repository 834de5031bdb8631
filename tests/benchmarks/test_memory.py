"""The memory sampler sees what is allocated, and tells copies from mapped files."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from memory import MemorySampler, Peak, read_bytes, resident_now

BYTES = 192 << 20


def wait_for_samples(sampler: MemorySampler) -> None:
    """Wait until one was begun after this call, however busy the machine is."""
    count = len(sampler._samples)
    while len(sampler._samples) < count + 2:
        time.sleep(0.001)


def test_copies_and_mapped_files_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    np.ones(BYTES, dtype=np.uint8).tofile(file)
    before = resident_now()
    sampler = MemorySampler()
    sampler.start()
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    assert int(mapped[::4096].sum()) == BYTES // 4096
    wait_for_samples(sampler)
    between = sampler.peak()
    copied = np.ones(BYTES, dtype=np.uint8)
    wait_for_samples(sampler)
    sampler.stop()
    assert between.mapped - before.mapped > 0.9 * BYTES
    assert between.copied - before.copied < 0.5 * BYTES
    assert sampler.peak().copied - before.copied > 0.9 * BYTES
    assert copied.nbytes == mapped.nbytes


def test_phases_get_the_peaks_of_their_own_time() -> None:
    sampler = MemorySampler()
    small, large = Peak(1, 1, 0), Peak(9, 8, 1)
    sampler._samples = [(0.5, small), (1.5, large), (2.5, small)]
    found = sampler.peaks({"first": 1.0, "second": 1.0, "none": 0.0, "third": 1.0})
    assert found["first"] == small
    assert found["second"] == large
    assert found["third"] == small
    assert found["none"] in (small, large), "the nearest sample stands for a short phase"


def test_bytes_read_from_disk_never_fall() -> None:
    first = read_bytes()
    assert 0 <= first <= read_bytes()

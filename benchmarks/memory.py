# SPDX-License-Identifier: Apache-2.0
"""Sample the resident memory of this process while something runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemorySampler", "Peak", "read_bytes"]

SAMPLE_SECONDS = 0.02
STATUS = Path("/proc/self/status")
IO = Path("/proc/self/io")


@dataclass(frozen=True)
class Peak:
    """Most bytes seen.

    Attributes:
        resident: All resident pages.
        copied: Those that no file backs: what was read, converted or allocated.
        mapped: Those of mapped files, which the system takes back when it needs room.
    """

    resident: int = 0
    copied: int = 0
    mapped: int = 0


class MemorySampler(threading.Thread):
    """Resident memory of this process, sampled until `stop`."""

    def __init__(self) -> None:
        """Make a sampler; `start` begins."""
        super().__init__(daemon=True)
        self._samples: list[tuple[float, Peak]] = []
        self._began, self._stopped = time.perf_counter(), threading.Event()

    def run(self) -> None:
        """Sample; the thread's body."""
        while True:
            self._samples.append((time.perf_counter() - self._began, resident_now()))
            if self._stopped.wait(SAMPLE_SECONDS):
                return

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self.join()

    def peak(self, begin: float = 0.0, end: float = float("inf")) -> Peak:
        """Return the peak between two moments, in seconds since the sampler was made."""
        inside = [p for at, p in self._samples if begin <= at <= end]
        if not inside:  # shorter than the time between two samples
            inside = [min(self._samples, key=lambda s: abs(s[0] - begin))[1]]
        return Peak(
            max(p.resident for p in inside),
            max(p.copied for p in inside),
            max(p.mapped for p in inside),
        )

    def peaks(self, seconds: Mapping[str, float]) -> dict[str, Peak]:
        """Return the peak of each phase, given the seconds of all phases in order."""
        peaks, begin = {}, 0.0
        for phase, duration in seconds.items():
            peaks[phase] = self.peak(begin, begin + duration)
            begin += duration
        return peaks


def resident_now() -> Peak:
    """Return what is resident now."""
    lines = (line.split(":") for line in STATUS.read_text().splitlines() if line.startswith("R"))
    found = {name: int(value.split()[0]) << 10 for name, value in lines}
    mapped = found["RssFile"] + found["RssShmem"]
    return Peak(found["RssAnon"] + mapped, found["RssAnon"], mapped)


def read_bytes() -> int:
    """Return the bytes that this process made the disk read so far."""
    return next(
        int(line.split()[1])
        for line in IO.read_text().splitlines()
        if line.startswith("read_bytes")
    )

# SPDX-License-Identifier: Apache-2.0
"""What this machine has left: memory of the host or of the GPU, and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

__all__ = [
    "disk_free_bytes",
    "existing_parent",
    "gpu_free_bytes",
    "memory_available_bytes",
    "peak_memory_bytes",
]

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
GROUP = Path("/sys/fs/cgroup")


def memory_available_bytes() -> int | None:
    """Return the host memory that a new process may use, or None where the system doesn't tell.

    In a container with a limit of its own, what is left below that limit.
    """
    left = [b for b in (_available(MEMINFO), _left_in_group(GROUP)) if b is not None]
    return min(left, default=None)


def peak_memory_bytes() -> int | None:
    """Return the most host memory that this process has held, mapped files that it read included.

    None where the system doesn't tell.
    """
    return _field(STATUS, "VmHWM:")


def gpu_free_bytes(index: int | None = None) -> int | None:
    """Return the free memory of a GPU, by default the current one, or None without one."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(index)
    return int(free)


def disk_free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system on which ``folder`` lies or would lie."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """Return ``folder``, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def _available(meminfo: Path) -> int | None:
    return _field(meminfo, "MemAvailable:")


def _field(file: Path, name: str) -> int | None:
    """Read a line such as ``VmHWM:  1024 kB`` of a file that the kernel writes, in bytes."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(name)), None)
    return int(found[1]) << 10 if found is not None else None


def _left_in_group(group: Path) -> int | None:
    """Read the limit of a version 2 control group; file pages count as free, being evictable."""
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        statistics = (group / "memory.stat").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    named = dict(zip(statistics[::2], statistics[1::2], strict=False))
    return max(0, int(limit) - used + int(named.get("file", 0)))

# SPDX-License-Identifier: Apache-2.0
"""Files of a bundle: digests, hard links, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ..core.errors import BundleError
from .manifest import FileEntry, TensorEntry

__all__ = [
    "cache_beside",
    "describe_files",
    "digests_ahead",
    "disk_use",
    "link_or_none",
    "safe_path",
    "sha256_of",
    "sha256_of_each",
    "weights_digest",
]

CHUNK_BYTES = 8 << 20
CACHE = "freewheel-cache"

Inode = tuple[int, int]
"""Device and number of a file, under whatever name."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def digests_ahead(paths: Iterable[Path]) -> Iterator[Mapping[Inode, Future[str]]]:
    """Begin the digests of files in the background, one file at a time.

    Yields:
        Digests to come, for `describe_files`. None is begun once the block has ended.
    """
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield {_inode(p): pool.submit(sha256_of, p) for p in paths}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def sha256_of_each(
    paths: Sequence[Path], ahead: Mapping[Inode, Future[str]] | None = None
) -> list[str]:
    """Return the digest of each file; one that stands there under several names is read once.

    Args:
        paths: Files.
        ahead: Digests that were begun before; those still waiting are computed here.
    """
    by_inode = {_inode(p): p for p in paths}
    begun = {i: f for i, f in (ahead or {}).items() if i in by_inode and not f.cancel()}
    with ThreadPoolExecutor() as pool:
        own = {i: pool.submit(sha256_of, p) for i, p in by_inode.items() if i not in begun}
        digests = {i: f.result() for i, f in (own | begun).items()}
    return [digests[_inode(p)] for p in paths]


def describe_files(
    folder: Path, ahead: Mapping[Inode, Future[str]] | None = None
) -> dict[str, FileEntry]:
    """Return size and digest of every file below ``folder``, by its path with forward slashes.

    Args:
        folder: Folder.
        ahead: Digests that were begun before; see `digests_ahead`.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): FileEntry(bytes=p.stat().st_size, sha256=d)
        for p, d in zip(paths, sha256_of_each(paths, ahead), strict=True)
    }


def disk_use(folder: Path, names: Iterable[str]) -> tuple[int, int]:
    """Return the bytes of some files, and the bytes that no file outside shares with them.

    A file that stands there under several names counts once.
    """
    names_of: dict[Inode, list[Path]] = {}
    for name in names:
        names_of.setdefault(_inode(folder / name), []).append(folder / name)
    total = own = 0
    for paths in names_of.values():
        status = paths[0].stat()
        total += status.st_size
        own += status.st_size if status.st_nlink == len(paths) else 0
    return total, own


def _inode(path: Path) -> Inode:
    status = path.stat()
    return status.st_dev, status.st_ino


def cache_beside(bundle: Path) -> Path:
    """Return the folder for what saves time and may be deleted; bundles side by side share it."""
    return bundle.absolute().parent / CACHE


def link_or_none(source: Path, target: Path) -> Path | None:
    """Hard-link ``source`` to ``target``; return None where the file system can't."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return None
    return target


def safe_path(folder: Path, name: str) -> Path:
    """Return ``folder / name``, refusing names that leave the folder.

    Raises:
        BundleError: the name is absolute, holds ``..``, a backslash or a zero byte, or resolves
            outside, or nowhere.
    """
    pure = PurePosixPath(name)
    is_odd = not name or "\\" in name or "\0" in name
    escapes = is_odd or pure.is_absolute() or ".." in pure.parts
    path = folder / pure
    try:
        escapes = escapes or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, no text
        escapes = True
    if escapes:
        raise BundleError(
            f"manifest.json, path '{name}'",
            "leaves the bundle's folder",
            "the bundle is damaged or hostile; build it again",
        )
    return path


def weights_digest(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> str:
    """Digest what a model computes with: every tensor's place and its file's digest."""
    text = json.dumps([[n, t.offset, files[t.file].sha256] for n, t in sorted(tensors.items())])
    return hashlib.sha256(text.encode()).hexdigest()

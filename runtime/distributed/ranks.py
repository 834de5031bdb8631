# SPDX-License-Identifier: Apache-2.0
"""The processes of one job: what they tell each other, and how each learns that another is lost.

Small things (facts, decisions, failures) go as JSON in frames of one size over gloo, on every
machine. So processes that are out of step read each other's notes instead of waiting. Tensors go
over gloo between CPUs and over NCCL between GPUs, from device buffer to device buffer.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ...bundle.files import sha256_of
from ...bundle.reader import Bundle
from ...core.errors import BackendUnavailable, FreewheelError, RankError
from ...core.launch import launch

__all__ = ["FRAME_BYTES", "TIMEOUT", "Ranks", "brief", "claim_error", "facts_of", "join_ranks"]

TIMEOUT = "FREEWHEEL_RANK_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others before it gives up."""

TIMEOUT_SECONDS = 600.0
JOIN_SECONDS = 60.0
"""Time for the launcher's store to answer, where an error is to be said once."""

POLL_SECONDS = 0.1
FRAME_BYTES = 4096
LONGEST_TEXT = 100

FACTS_HINT = "start every rank with the same command, on the same files and versions"


def brief(text: str) -> str:
    """Return a text that fits a note and differs where the text does."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]}… ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def facts_of(bundle: Bundle, backend: str | None) -> dict[str, str]:
    """Return the facts about a bundle, and what runs it, that all ranks must agree on."""
    packages = ("freewheel", "torch", "diffusers")
    return {
        **{f"the version of {name}": version(name) for name in packages},
        "the bundle's manifest": sha256_of(bundle.folder / "manifest.json"),
        "the backend": backend or bundle.manifest.engines[0].backend,
    }


class Ranks:
    """All processes of a job, or some of them, seen from one of them.

    Every rank calls the same methods in the same order.

    Attributes:
        rank: This process's, among these.
        size: Processes.
        members: Of each of them its rank in the job, as messages name it.
    """

    def __init__(
        self, group: Any, timeout: timedelta, store: Any = None, members: Sequence[int] = ()
    ) -> None:
        """Take part in a group.

        Args:
            group: A gloo process group of these ranks.
            timeout: Time that a rank waits for the others.
            store: The job's key-value store; None where a script made its own group.
            members: Whose group it is; empty is all ranks'.
        """
        import torch.distributed as dist

        self.members = tuple(members) or tuple(range(dist.get_world_size()))
        self.rank, self.size = self.members.index(dist.get_rank()), len(self.members)
        self._group, self._timeout, self._store = group, timeout, store
        self._waits = 0
        self._device_group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.members[self.rank] == 0

    def divided(self, groups: Sequence[Sequence[int]]) -> Ranks:
        """Return the group that this rank is in, of several that all ranks of a job are divided into.

        Args:
            groups: Ranks of each, the same on every rank.
        """
        import torch.distributed as dist

        with self._waiting("dividing the ranks"):
            made = [dist.new_group(list(g), backend="gloo", timeout=self._timeout) for g in groups]
        mine = next(i for i, group in enumerate(groups) if self.rank in group)
        return Ranks(made[mine], self._timeout, self._store, groups[mine])

    def tell(self, note: Mapping[str, Any], doing: str) -> list[dict[str, Any]]:
        """Give every rank a note, and return all ranks' notes by rank.

        Args:
            note: JSON of at most `FRAME_BYTES`.
            doing: What for, for the message where another rank is lost.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        import torch.distributed as dist

        content = json.dumps(note).encode()
        assert len(content) <= FRAME_BYTES, f"a note of {len(content)} bytes"
        own = torch.frombuffer(bytearray(content.ljust(FRAME_BYTES)), dtype=torch.uint8)
        frames = [torch.zeros(FRAME_BYTES, dtype=torch.uint8) for _ in range(self.size)]
        with self._waiting(doing):
            dist.all_gather(frames, own, group=self._group)
        return [json.loads(bytes(frame.tolist())) for frame in frames]

    def compare(self, facts: Mapping[str, str], hint: str = FACTS_HINT) -> None:
        """Hold what this rank is about to do against the others.

        Args:
            facts: Texts by the name that a message gives them.
            hint: What to do where they differ.

        Raises:
            RankError: a fact differs, and which; a rank is gone or does not answer.
        """
        notes = self.tell({n: brief(t) for n, t in facts.items()}, "comparing what to do")
        for rank, note in enumerate(notes):
            for name in {**notes[0], **note}:
                found, wanted = (n.get(name, "nothing") for n in (note, notes[0]))
                if found != wanted:
                    what = f"{name} is '{found}', rank {self.members[0]}'s is '{wanted}'"
                    raise RankError(f"rank {self.members[rank]}", what, hint)

    def beat(self) -> None:
        """Give a sign of life to ranks in `wait_for_all`."""
        with self._waiting("giving a sign of life"):
            self._store.add(f"beats/{self.rank}", 1)

    def wait_for_all(self, doing: str) -> None:
        """Wait until every rank has come here, as long as those that work give signs of life.

        For pieces of work that take longer than the timeout.

        Raises:
            RankError: no rank has given a sign of life for as long as the timeout.
        """
        self._waits += 1
        key, seen, since = f"waits/{self._waits}", -1, time.monotonic()
        with self._waiting(doing):
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.size:
                beats = sum(self._store.add(f"beats/{rank}", 0) for rank in range(self.size))
                if beats != seen:
                    seen, since = beats, time.monotonic()
                elif time.monotonic() - since > self._timeout.total_seconds():
                    raise RuntimeError("timeout")
                time.sleep(POLL_SECONDS)

    def share(self, content: bytes, doing: str) -> list[bytes]:
        """Give every rank some bytes, and return all ranks' bytes by rank.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        import torch.distributed as dist

        counts = [note["bytes"] for note in self.tell({"bytes": len(content)}, doing)]
        longest = max(1, *counts)
        own = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in counts]
        with self._waiting(doing):
            dist.all_gather(found, own, group=self._group)
        return [bytes(f[:n].numpy()) for f, n in zip(found, counts, strict=True)]

    def trade(
        self, given: Sequence[Tensor], wanted: Sequence[tuple[int, Tensor]], doing: str
    ) -> int:
        """Give every other rank some tensors and take theirs, all at once.

        Args:
            given: Contiguous tensors of this rank.
            wanted: Rank and buffer of every tensor of the others; filled when this returns.
            doing: As for `tell`.

        Returns:
            Bytes that this rank sent.

        Raises:
            RankError: a rank is gone or does not answer, or two ranks have one GPU.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        return self.swap([(r, t) for t in given for r in others], wanted, doing)

    def swap(
        self, sent: Sequence[tuple[int, Tensor]], wanted: Sequence[tuple[int, Tensor]], doing: str
    ) -> int:
        """Give some ranks a tensor each and take theirs, all at once.

        Args:
            sent: Rank and contiguous tensor of this rank.
            wanted: Rank and contiguous buffer; filled when this returns.
            doing: As for `tell`.

        Returns:
            Bytes that this rank sent.

        Raises:
            RankError: a rank is gone or does not answer, or two ranks have one GPU.
        """
        import torch.distributed as dist

        group = self._group_of((*sent, *wanted)[0][1].device)
        operations = [
            dist.P2POp(how, tensor.view(torch.uint8), group=group, group_peer=rank)
            for how, tensors in ((dist.isend, sent), (dist.irecv, wanted))
            for rank, tensor in tensors
        ]
        with self._waiting(doing):
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return sum(tensor.nbytes for _, tensor in sent)

    def totals(self, values: Sequence[float], doing: str) -> list[list[float]]:
        """Give every rank a few numbers, and return all ranks' numbers by rank.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._waiting(doing):
            dist.all_gather(found, own, group=self._group)
        return [one.tolist() for one in found]

    def abandon(self, error: FreewheelError | None) -> None:
        """End this rank's part of the job because it failed, and leave word of it.

        Ranks that wait for tensors of this one see its connection closed, and read why.

        Args:
            error: What failed; None where another rank has left word.
        """
        with suppress(RuntimeError):
            if self._store is not None and error is not None:
                parts = {"where": error.where, "what": error.what, "hint": error.hint}
                self._store.set("failure", json.dumps({"rank": self.members[self.rank], **parts}))
        self.leave()

    def leave(self) -> None:
        """End this rank's part of the job."""
        _end_group()

    def _group_of(self, device: torch.device) -> Any:
        import torch.distributed as dist

        if device.type != "cuda":
            return self._group
        if self._device_group is None:
            place = f"{socket.gethostname()}, GPU {torch.cuda.current_device()}"
            places = [n["place"] for n in self.tell({"place": place}, "naming its GPU")]
            first = places.index(place)
            if places.count(place) > 1:
                second = places.index(place, first + 1)
                raise RankError(
                    f"rank {self.members[second]}",
                    f"has rank {self.members[first]}'s GPU: {place}",
                    "start one rank per GPU",
                )
            with self._waiting("starting NCCL"):
                self._device_group = dist.new_group(
                    list(self.members),
                    backend="nccl",
                    timeout=self._timeout,
                    use_local_synchronization=True,
                )
        return self._device_group

    def _word_of_failure(self) -> RankError | None:
        """Return what a rank that failed has left word of."""
        with suppress(RuntimeError):
            if self._store is not None and self._store.check(["failure"]):
                told = json.loads(self._store.get("failure"))
                where = f"rank {told['rank']}, {told['where']}"
                return RankError(where, told["what"], told["hint"])
        return None

    @contextmanager
    def _waiting(self, doing: str) -> Iterator[None]:
        """Say which rank is lost, as far as that is known, instead of what a socket said."""
        try:
            yield
        except RuntimeError as error:
            if (told := self._word_of_failure()) is not None:
                raise told from error
            other = f"rank {self.members[1 - self.rank]}" if self.size == 2 else "another rank"
            seconds = self._timeout.total_seconds()
            if "imed out" in str(error) or "imeout" in str(error):
                what = f"has not answered rank {self.members[self.rank]} for {seconds:g} s while {doing}"
                hint = f"see what it waits for; {TIMEOUT}=SECONDS allows more"
            else:
                what = f"is gone, said rank {self.members[self.rank]} while {doing}"
                hint = "see how it ended (the launcher's last lines name it), and run it again"
            raise RankError(other, what, hint) from error


def timeout_of_ranks() -> timedelta:
    """Return how long a rank waits for the others.

    Raises:
        RankError: the environment variable holds no number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT, str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RankError(TIMEOUT, f"is '{text}', expected seconds above 0", f"set {TIMEOUT}=600")
    return timedelta(seconds=seconds)


def join_ranks() -> Ranks:
    """Join the job that a launcher started this process in: ``torchrun … script.py``.

    A script that has called ``torch.distributed.init_process_group`` already keeps its group.

    Raises:
        BackendUnavailable: this PyTorch has no torch.distributed with gloo.
        RankError: there is one process alone, or the others do not come.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # not in __all__

    if not (dist.is_available() and dist.is_gloo_available()):
        raise BackendUnavailable(
            "torch.distributed", "has no gloo in this PyTorch", "install PyTorch's own wheel"
        )
    timeout, place = timeout_of_ranks(), launch()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a lost rank raises, not aborts
    began = not dist.is_initialized()
    if began and place is None:
        raise RankError(
            "join_ranks",
            "finds one process alone",
            "start the script with torchrun --nproc-per-node 2",
        )
    if place is not None and torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    store = None
    try:
        if began:
            # A restart finds the last attempt's keys in the launcher's store.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            shared, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
            store = PrefixStore(f"freewheel/{attempt}", shared)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timeout
            )
            atexit.register(_end_group)
        ranks = Ranks(dist.new_group(backend="gloo", timeout=timeout), timeout, store)
    except RuntimeError as error:
        raise RankError(
            "torch.distributed",
            f"can't bring the ranks together: {_first_line(error)}",
            f"see that all were started and reach MASTER_ADDR; {TIMEOUT}=SECONDS allows more",
        ) from error
    return ranks


def _end_group() -> None:
    """Destroy this process's groups; their threads abort a process that ends before."""
    import torch.distributed as dist

    with suppress(RuntimeError):  # the others may have ended before
        if dist.is_initialized():
            dist.destroy_process_group()


def claim_error() -> bool:
    """Tell whether this rank is the one to say what went wrong: the first that asks.

    Ranks that fail because another did would say so too; the launcher's store lets one speak.
    """
    if launch() is None:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # rank 0 keeps the store, and may be the one that is gone
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=JOIN_SECONDS),
        )
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"freewheel/errors/{run}", 1)) == 1
    except RuntimeError:
        return True  # the launcher is gone, and with it who would hear it twice


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

# SPDX-License-Identifier: Apache-2.0
"""`freewheel run` in a process that is made to fail in the way its first argument says."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freewheel.cli import main
from freewheel.core.errors import NotFiniteError, RequestError
from freewheel.runtime.branch_cache import BranchCache
from freewheel.runtime.distributed import ranks
from freewheel.runtime.distributed.exchange import Exchange
from freewheel.runtime.session import Session

AT_STEP = 2
AT_EXCHANGE = 30
GIB = 1 << 30


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def silent() -> None:
    time.sleep(3600)


def without_memory() -> None:
    size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (size + GIB, resource.RLIM_INFINITY))
    torch.zeros(8 * GIB)


def not_finite() -> None:
    raise NotFiniteError(f"branch 'uncond', step {AT_STEP}", "made values that are not finite", "x")


DURING = {f.__name__: f for f in (killed, silent, without_memory, not_finite)}


def fail_at_step(how: Any) -> None:
    step = Session.step

    def failing(self: Session, branch: str, step_index: int, inputs: Any) -> Tensor:
        if step_index == AT_STEP:
            how()
        return step(self, branch, step_index, inputs)

    Session.step = failing  # type: ignore[method-assign]  # the fault


def fail_in_a_block(how: Any) -> None:
    run, done = Exchange.run, 0

    def failing(self: Exchange) -> None:
        nonlocal done
        done += 1
        if done == AT_EXCHANGE:
            how()
        run(self)

    Exchange.run = failing  # type: ignore[method-assign]  # the fault


def raise_in_an_exchange() -> None:
    raise RequestError("an exchange", "fails", "x")


def decide_otherwise() -> None:
    decide = BranchCache.decide

    def failing(self: BranchCache, step_index: int, pace: Any) -> Any:
        found = decide(self, step_index, pace)
        return replace(found, compute=not found.compute) if step_index == AT_STEP else found

    BranchCache.decide = failing  # type: ignore[method-assign]  # the fault


def fail_in_second_run() -> None:
    begin, runs = Session.begin, 0

    def failing(self: Session, *given: Any, **named: Any) -> None:
        nonlocal runs
        runs += 1
        if runs > 1:
            killed()
        begin(self, *given, **named)

    Session.begin = failing  # type: ignore[method-assign]  # the fault


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    sys.argv = ["freewheel", *arguments]
    if os.environ["RANK"] == "1":
        if kind in DURING:
            fail_at_step(DURING[kind])
        elif kind == "killed_in_a_block":
            fail_in_a_block(killed)
        elif kind == "fails_in_a_block":
            fail_in_a_block(raise_in_an_exchange)
        elif kind == "decides_otherwise":
            decide_otherwise()
        elif kind == "killed_in_its_second_run":
            fail_in_second_run()
        elif kind == "another_version":
            known = ranks.version
            ranks.version = lambda name: "0.0.1" if name == "freewheel" else known(name)
        elif kind == "another_request":
            sys.argv[sys.argv.index("--seed") + 1] = "8"
        elif kind == "another_bundle":
            sys.argv[2] = os.environ["OTHER_BUNDLE"]
    main()

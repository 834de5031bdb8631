# SPDX-License-Identifier: Apache-2.0
"""Run a function in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

__all__ = ["call"]


def call(context: BaseContext, function: Callable[..., None], *arguments: Any) -> Any:
    """Return what ``function`` puts into the queue that it is given last.

    Raises:
        ChildProcessError: the process ended without an answer.
    """
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))  # type: ignore[attr-defined]  # typeshed leaves it to the subclasses
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.01)
    if queue.empty():
        raise ChildProcessError(
            f"{function.__name__}{arguments[:1]} exited with {process.exitcode}"
        )
    found = queue.get()
    process.join()
    return found

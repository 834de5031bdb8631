# SPDX-License-Identifier: Apache-2.0
"""A process that dies is told of; nobody waits for its answer."""

from __future__ import annotations

import multiprocessing
import operator

import pytest
from own_process import call


def test_a_process_that_ends_without_an_answer_is_an_error() -> None:
    context = multiprocessing.get_context("spawn")
    with pytest.raises(ChildProcessError, match=r"truediv\(1,\) exited with 1"):
        call(context, operator.truediv, 1)  # divides by the queue: a TypeError

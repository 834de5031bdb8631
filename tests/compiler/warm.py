"""Import the compiler and export once, so that processes forked from here begin at once."""

from __future__ import annotations

import torch

from freewheel.compiler.decide import decide_program
from freewheel.policies.off import Off

torch.set_num_threads(1)
decide_program(Off())

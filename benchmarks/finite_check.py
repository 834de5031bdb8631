# SPDX-License-Identifier: Apache-2.0
"""Time the look for values that are not finite: `python benchmarks/finite_check.py`.

What a step of Wan 2.1 1.3B makes at 480×832×1 (1,560 tokens) and at 81 frames (32,760 tokens): the
residual of a computed step, and the output of every step.
"""

from __future__ import annotations

import time

import torch

from freewheel.runtime.finite import is_finite

SHAPES = {
    "residual, 1,560 tokens": (1, 1560, 1536),
    "output, 1,560 tokens": (1, 16, 1, 60, 104),
    "residual, 32,760 tokens": (1, 32760, 1536),
    "output, 32,760 tokens": (1, 16, 21, 60, 104),
}
ROUNDS = 15


def main() -> None:
    """Print the median milliseconds of each."""
    print("| tensor | float32 ms | bfloat16 ms |\n|---|--:|--:|")
    for name, shape in SHAPES.items():
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.randn(shape).to(dtype)
            seconds = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                assert is_finite(tensor)
                seconds.append(time.perf_counter() - began)
            cells.append(f"{1e3 * sorted(seconds)[ROUNDS // 2]:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

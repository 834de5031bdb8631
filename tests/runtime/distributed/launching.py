# SPDX-License-Identifier: Apache-2.0
"""Start processes as a user does: with torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SLOW_SECONDS = 1800
"""A test that hangs fails then; ranks give up on one another before, after ten minutes."""


def torchrun(
    *arguments: object, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    return subprocess.run(
        [*launcher, *place, *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        timeout=SLOW_SECONDS,
        check=False,
        env=variables,
        cwd=Path(__file__).parent,
    )

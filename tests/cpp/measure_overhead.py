"""Measure what a step spends outside engines in Python; `cpp/tools/overhead.cpp` does it in C++.

python tests/cpp/measure_overhead.py BUNDLE POLICY
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import torch

from freewheel.bundle.reader import Bundle
from freewheel.engines.openvino import OpenVinoCall
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

RUNS, STEPS = 5, 30


def main(folder: str, policy: str) -> None:
    spent = 0.0
    original = OpenVinoCall.run

    def timed(call: OpenVinoCall) -> None:
        nonlocal spent
        began = time.perf_counter()
        original(call)
        spent += time.perf_counter() - began

    OpenVinoCall.run = timed  # type: ignore[method-assign]  # a measurement, not a program
    session = Session(Model(Bundle(folder), "openvino"))
    latents = torch.randn((1, 16, 5, 12, 12), generator=torch.Generator().manual_seed(1))
    outside: dict[bool, list[float]] = {True: [], False: []}
    for run in range(RUNS):
        session.begin(torch.linspace(1000, 30, STEPS), CacheSetting(policy=policy))
        session.set_prompt("cond", {"text_states": torch.full((1, 24, 128), 0.1)})
        session.set_prompt("uncond", {"text_states": torch.full((1, 24, 128), -0.1)})
        for step in range(STEPS):
            for branch in ("cond", "uncond"):
                spent = 0.0
                session.step(branch, step, {"latents": latents})
                record = session.statistics.branches[branch]
                if run and step:
                    outside[record.computed[step]].append((record.seconds[step] - spent) * 1e6)
    found = {
        "policy": policy,
        "computed_us": round(float(np.median(outside[True])), 1),
        "reused_us": round(float(np.median(outside[False])), 1) if outside[False] else 0.0,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

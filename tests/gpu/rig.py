# SPDX-License-Identifier: Apache-2.0
"""What a GPU without TensorRT can show of the TensorRT run path, in one script.

    python tests/gpu/rig.py pack out/rig          # where everything is installed; no GPU needed
    python3 tests/gpu/rig.py run out/rig          # on the GPU: torch, numpy, onnx and safetensors
    python tests/gpu/rig.py run out/rig --rehearse  # the same on a CPU, through the feigned GPU

``pack`` makes a folder of a few MB and keeps the pieces that are there: bundles whose plans the
stand-in reads, TensorRT's bindings over their stub, and the packages that a bare machine lacks.
``run`` needs no network and no TensorRT. Each section is a process of its own, since a fault of a
kernel ends everything that its process does on the GPU. After ``--minutes`` none is begun. The
report is docs/gpu-report.md (a rehearsal: out/rig-rehearsal.md), written after each section; what
the processes printed lies beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = "9.0"  # of Hopper, which TensorRT-RTX does not know
SITE_PACKAGES = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")
PAUSE_CYCLES = 200_000  # about 0.1 ms on an H100
BLOCK_14B = {
    **{f"attn{a}.{p}": (5120, 5120) for a in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out")},
    "ffn.up": (13824, 5120),
    "ffn.down": (5120, 13824),
    "modulation": (6, 5120),
}
BLOCKS_14B = 40
TIMED = 20
HBM_GB_PER_S = {"H100": 3350, "H200": 4800}
"""NVIDIA's figures of the SXM cards; a part of the card's name → memory bandwidth."""
SECTION_SECONDS = 150
"""Of a GPU; a rehearsal takes what it takes."""
MIXED = (1, 2, 3, 4, 6)
"""Residuals that `reuse` is timed with."""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack").add_argument("folder", type=Path)
    runner = commands.add_parser("run")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--rehearse", action="store_true")
    runner.add_argument("--minutes", type=float, default=10.0)
    runner.add_argument("--report", type=Path)
    runner.add_argument("--only", action="append", help="Part of a section's title; repeatable.")
    runner.add_argument("--section", type=int, help="Run this one here; `run` calls itself so.")
    given = parser.parse_args()
    _find_packages(given.folder)
    if given.command == "pack":
        pack(given.folder)
    elif given.section is not None:
        run_section(given.folder, given.rehearse, given.section)
    else:
        sys.exit(run(given.folder, given.rehearse, given.minutes, given.report, given.only))


def _find_packages(folder: Path) -> None:
    """Make `freewheel` and the stand-in importable, installed or not."""
    sys.path[:0] = [str(ROOT / "tests" / "rig"), str(ROOT / "benchmarks")]
    sys.path.append(str(folder / f"site-{sys.implementation.cache_tag}"))
    if importlib.util.find_spec("freewheel") is None:
        spec = importlib.util.spec_from_file_location(
            "freewheel", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None, "the file is there"
        assert spec.loader is not None, "it is Python"
        module = importlib.util.module_from_spec(spec)
        sys.modules["freewheel"] = module
        spec.loader.exec_module(module)


def pack(folder: Path) -> None:
    """Write everything that `run` reads."""
    import real_bindings
    from host_device import PLACE, HostDevice

    from freewheel.bundle.reader import Bundle
    from freewheel.compiler.build import build
    from freewheel.compiler.engines import compile_graph
    from freewheel.compiler.plan import plan
    from freewheel.compiler.request import BuildRequest
    from freewheel.engines import Target, backend
    from freewheel.engines.tensorrt import TensorRT
    from freewheel.runtime.settings import config_entries

    folder.mkdir(parents=True, exist_ok=True)
    off = config_entries(["off"], lambda text: None)
    if not (folder / "tiny").is_dir():
        _write_tiny(folder / "tiny-model")
        made = folder / "tiny-onnxruntime"
        build(plan(BuildRequest(str(folder / "tiny-model"), made, [backend("onnxruntime")], off)))
        with stand_in(HostDevice(races=False), rehearsed=True):
            from graft import grafted

            grafted(Bundle(made), TensorRT(device=PLACE), folder / "tiny", CAPABILITY)
        for left in ("tiny-model", "tiny-onnxruntime"):
            shutil.rmtree(folder / left)
    if not (folder / "wide").is_dir():
        graphs, profiles = _trace_wide(folder / "traced", Bundle(folder / "tiny").manifest)
        with stand_in(HostDevice(races=False), rehearsed=True):
            for name, graph in graphs.items():
                target = Target(graph.precision, {**profiles[name]}, (CAPABILITY,))
                path = folder / "traced" / graph.file
                compile_graph(TensorRT(device=PLACE), path, target, folder / "traced" / name)
        shutil.rmtree(folder / "traced" / "graphs")
        (folder / "traced").rename(folder / "wide")
    for tag, python in (("cpython-312", "3.12"), (sys.implementation.cache_tag, None)):
        _pack_packages(folder / f"site-{tag}", python)
        real_bindings.pack(real_bindings.NEWEST, folder / "bindings", tag, python)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def _trace_wide(folder: Path, other: Any) -> tuple[Any, Any]:
    """Trace what a step of Wan 2.1 1.3B repeats, in bfloat16; no weight is read.

    Args:
        folder: Gets the graphs.
        other: Manifest of a bundle whose configs and policies this one would carry.
    """
    from diffusers import WanTransformer3DModel
    from synthetic import GEOMETRIES

    from freewheel.compiler.cut.models import family_of
    from freewheel.compiler.cut.transformer import cut_transformer
    from freewheel.compiler.graphs.caching import cache_segments
    from freewheel.compiler.graphs.write import write_graphs
    from freewheel.compiler.profiles import BuildSizes, dim_ranges, profiles_of
    from freewheel.core.progress import Silent
    from freewheel.engines import TensorSpec

    config = {**GEOMETRIES["wan2.1-t2v-1.3b"], "num_layers": 1}
    config = dict(WanTransformer3DModel(**config).config)
    cut = cut_transformer(
        family_of("WanTransformer3DModel", "rig"), config, "bfloat16", lambda name: "bfloat16"
    )
    head = next(s for s in cut.segments if s.name == "head").outputs["hidden"]
    segments = [s for s in cut.segments if s.name in ("head", "block", "finish")]
    segments += cache_segments({"hidden": TensorSpec(head.dtype, head.shape)}, cut.history_dtype)
    (folder / "graphs").mkdir(parents=True)
    graphs = write_graphs(segments, cut.example_dims, folder, Silent(), None)
    sizes = BuildSizes(height=(480,) * 3, width=(832,) * 3, frames=(1, 81, 81))
    ranges = dim_ranges(cut, sizes, other.configs, None)
    return graphs, profiles_of(graphs, other.policies, cut, ranges)


def _write_tiny(folder: Path) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    }
    WanTransformer3DModel(**shape).eval().save_pretrained(folder)


def _pack_packages(target: Path, python: str | None) -> None:
    from importlib.metadata import version

    if target.is_dir():
        return
    wanted = [f"{name}=={version(name)}" for name in SITE_PACKAGES]
    other = ["--python-version", python, "--platform", "manylinux2014_x86_64"] if python else []
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--target", str(target), *other, *wanted,
    ]  # fmt: skip
    subprocess.run(command, check=True)


@contextlib.contextmanager
def stand_in(device: Any, *, rehearsed: bool, bindings: Path | None = None) -> Iterator[Any]:
    """Install the stand-in as the package `tensorrt`; feign CUDA for a rehearsal."""
    import real_bindings
    from stand_in import StandInModule

    if bindings is not None:
        real_bindings.FOLDER = bindings
    patched = _Patches()
    module = StandInModule("tensorrt", real_bindings.bindings(real_bindings.NEWEST), device)
    try:
        sys.modules["tensorrt"] = module
        if rehearsed:
            from host_device import feign_cuda

            major, minor = CAPABILITY.split(".")
            feign_cuda(patched, device, (int(major), int(minor)))
        with device if rehearsed else contextlib.nullcontext():
            yield module.stand_in
    finally:
        del sys.modules["tensorrt"]
        patched.undo()


class _Patches:
    """What `pytest.MonkeyPatch` offers, where there is no pytest."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


class Rig:
    """One run of the rig: the device, the stand-in and the report's lines.

    Attributes:
        home: What the stand-in was asked (`stand_in.Installation`).
        device: Where tensors live.
        feigned: The feigned GPU of a rehearsal, or None.
    """

    def __init__(self, folder: Path, home: Any, device: Any, feigned: Any) -> None:
        self.folder, self.home, self.device, self.feigned = folder, home, device, feigned
        self.lines: list[str] = []
        self.failures: list[str] = []

    def table(self, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        self.lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        self.lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]

    def session(self, **options: Any) -> Any:
        from freewheel.bundle.reader import Bundle
        from freewheel.runtime.model import DeviceOptions, Model
        from freewheel.runtime.session import Session

        bundle = Bundle(self.folder / "tiny")
        return Session(Model(bundle, "tensorrt", options=DeviceOptions(**options)))

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


def steps(rig: Rig, session: Any, policy: str) -> Iterator[tuple[str, Any]]:
    """Run a policy; yields each step's branch and output."""
    import torch
    from driven_runs import PARAMETERS, STEPS

    from freewheel.policies.setting import CacheSetting

    generator = torch.Generator().manual_seed(0)
    for branch in ("cond", "uncond"):
        states = torch.randn(1, 5, 24, generator=generator).to(rig.device)
        session.set_prompt(branch, {"text_states": states})
    setting = CacheSetting(policy=policy, parameters=PARAMETERS[policy])
    session.begin(torch.linspace(999, 30, STEPS), setting)
    latents = torch.randn(1, 4, 3, 4, 6, generator=generator).to(rig.device)
    for step in range(STEPS):
        given = {"latents": latents}
        guide = session.step("cond", step, given)
        yield "cond", guide
        yield "uncond", session.step("uncond", step, given)
        latents.sub_(guide, alpha=0.1)  # in place: the loop itself allocates nothing


def outputs(rig: Rig, session: Any, policy: str) -> Any:
    import torch

    return torch.stack([output.clone() for _, output in steps(rig, session, policy)]).cpu()


def policies_in_every_way(rig: Rig) -> None:
    """Every policy, plain, offloaded, as graphs and both, with pauses: equal to a plain run."""
    import torch
    from driven_runs import OPTIONS, POLICIES, STEPS

    rows = []
    rig.pause(0)
    expected = {policy: outputs(rig, rig.session(), policy) for policy in POLICIES}
    rig.pause(PAUSE_CYCLES)
    for name, options in OPTIONS.items():
        for policy in POLICIES:
            session = rig.session(**options)
            found = outputs(rig, session, policy)
            same = bool(torch.equal(found, expected[policy]))
            computed = session.statistics.computed_steps
            rows.append((policy, name, f"{computed:g} of {STEPS}", "equal" if same else "OTHER"))
            if not same:
                worst = float((found - expected[policy]).abs().max())
                rig.failures.append(f"{policy}, {name}: differs from a plain run by {worst:.3g}")
    rig.pause(0)
    rig.table(("policy", "driven", "computed", "against a plain run without pauses"), rows)


def default_stream_hand_off(rig: Rig) -> None:
    """What the caller enqueues on the default stream comes before and after a step."""
    import torch

    rig.pause(PAUSE_CYCLES)
    session, expected = rig.session(), outputs(rig, rig.session(), "taylorseer")
    found = []
    for _, output in steps(rig, session, "taylorseer"):
        found.append(output + 0)  # enqueued on the default stream, at once
    same = bool(torch.equal(torch.stack(found).cpu(), expected))
    rig.pause(0)
    rig.lines += [
        f"{len(found)} outputs read on the default stream right after each step: "
        f"{'all equal' if same else 'NOT EQUAL'}.",
        "",
    ]
    if not same:
        rig.failures.append("an output read on the default stream was not finished")


def several_sessions(rig: Rig) -> None:
    """Sessions on threads, sharing weights and pinned blocks."""
    import torch

    jobs = {"taylorseer": {}, "adacache": {"offload": True}, "easycache": {"cuda_graphs": True}}
    expected = {policy: outputs(rig, rig.session(), policy) for policy in jobs}
    rig.pause(PAUSE_CYCLES)
    found: dict[str, Any] = {}
    faults: list[str] = []

    def work(policy: str, options: Mapping[str, bool]) -> None:
        try:
            with rig.feigned or contextlib.nullcontext():
                found[policy] = outputs(rig, rig.session(**options), policy)
        except BaseException:  # told below
            faults.append(traceback.format_exc(limit=3))

    threads = [threading.Thread(target=work, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.pause(0)
    rows = [
        (
            policy,
            " and ".join(options) or "plain",
            "equal"
            if policy in found and torch.equal(found[policy], expected[policy])
            else "NOT EQUAL",
        )
        for policy, options in jobs.items()
    ]
    rig.table(("policy", "driven", "beside the others"), rows)
    rig.failures += faults + [row[0] for row in rows if row[2] != "equal"]


def counts_in_the_loop(rig: Rig) -> None:
    """Allocations and copies in the loop, by torch's own counters and profiler."""
    from driven_runs import OPTIONS, STEPS

    rows = []
    for name, options in OPTIONS.items():
        before = len(rig.home.contexts)
        session = rig.session(check_finite=False, **options)
        for _ in steps(rig, session, "taylorseer"):
            pass
        hidden = session._shared["hidden"].nbytes
        loop = steps(rig, session, "taylorseer")
        for _ in range(4):  # two steps: the prompt, the run's tables, the first decisions
            next(loop)
        contexts = len(rig.home.contexts)
        rig.home.counts.clear()
        row = rig.watch(lambda loop=loop: [None for _ in loop])
        assert len(rig.home.contexts) == contexts, "a context was made inside the loop"
        written, inside = _places_of_residuals(rig.home.contexts[before:])
        rows.append(
            (
                name,
                contexts - before,
                rig.home.counts["enqueues"],
                *row,
                hidden,
                f"{inside} of {written}",
            )
        )
        if not 0 < inside == written:
            rig.failures.append(f"{name}: residuals are written beside their ring")
        if row[0]:
            rig.failures.append(f"{name}: {row[0]} allocations inside the loop")
        if row[2] >= hidden and "offload" not in name:
            rig.failures.append(f"{name}: {row[2]} bytes are copied between host and device")
    columns = (
        "driven",
        "contexts",
        "enqueues",
        "allocations",
        "copies to and from the host",
        "largest of them, bytes",
        "hidden states, bytes",
        "residuals in their ring",
    )
    rig.lines += [
        f"{STEPS - 2} steps of two branches, `taylorseer`, after a whole run; what the "
        "stand-in's own kernels allocate is left out.",
        "",
    ]
    rig.table(columns, rows)


def _places_of_residuals(contexts: list[Any]) -> tuple[int, int]:
    """Count the addresses that residuals are written to, and those of them inside a history."""
    written, histories = set(), set()
    for context in contexts:
        engine = context._engine
        written |= {context._addresses[n] for n in engine._outputs if n.startswith("residual")}
        histories |= {
            (context._addresses[n], context._bytes(n))
            for n in engine._inputs
            if n.startswith("history")
        }
    inside = [a for a in written if any(start <= a < start + n for start, n in histories)]
    return len(written), len(inside)


def step_at_real_size(rig: Rig) -> None:
    """A step of real width, each torch operation a pass over memory of its own."""
    calls = ((name, engine.bind(tensors), moved) for name, engine, tensors, moved in _wide(rig))
    _tell_step(rig, calls)


def step_at_real_size_fused(rig: Rig) -> None:
    """The same graphs fused by torch.compile, as an engine's builder fuses."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    def fused(engine: Any, tensors: Mapping[str, Any]) -> Any:
        program = engine._plan._program
        values = [tensors[n] for n in engine.inputs]

        def graph(*given: Any) -> tuple[Any, ...]:
            made = program.compute(dict(zip(engine.inputs, given, strict=True)))
            return tuple(made[n] for n in engine.outputs)

        with rig.as_kernels():
            compiled = torch.compile(make_fx(graph)(*values), dynamic=False)

        def run(self: Any) -> None:
            with rig.as_kernels():
                compiled(*values)

        return type("Fused", (), {"run": run})()

    with torch.no_grad():
        calls = (
            (name, fused(engine, tensors), moved) for name, engine, tensors, moved in _wide(rig)
        )
        _tell_step(rig, calls)


def _wide_tokens(rig: Rig) -> int:
    """Return the tokens of a wide step: of 81 frames, or of the one that is the least built for."""
    return (1 if rig.feigned else 21) * 30 * 52


def _wide(rig: Rig) -> Iterator[tuple[str, Any, Mapping[str, Any], int]]:
    """Yield each graph of a wide step: its name, its engine, its tensors and their bytes."""
    import torch

    from freewheel.engines.tensorrt import TensorRT

    tokens = _wide_tokens(rig)
    sizes = {
        "batch": 1,
        "tokens": tokens,
        "text_tokens": 512,
        "frames": tokens // (30 * 52),
        "height": 60,
        "width": 104,
    }
    backend = TensorRT(device=rig.device)
    graphs = [
        ("head", 1),
        ("block", 1),
        ("delta", 1),
        *(("reuse", k) for k in MIXED),
        ("finish", 1),
    ]
    for graph, slots in graphs:
        engine = backend.load(rig.folder / "wide" / graph)
        tensors = {
            name: torch.zeros(
                [{**sizes, "slots": slots}[d] if isinstance(d, str) else d for d in spec.shape],
                dtype=getattr(torch, spec.dtype),
                device=rig.device,
            )
            for name, spec in {**engine.inputs, **engine.outputs}.items()
        }
        name = f"reuse, {slots} residuals" if graph == "reuse" else graph
        yield name, engine, tensors, sum(t.nbytes for t in tensors.values())


def _tell_step(rig: Rig, calls: Iterator[tuple[str, Any, int]]) -> None:
    """Time each graph; set a reused step beside a computed one of 30 blocks."""
    copied = _copy_speed(rig)
    nominal = next((b for n, b in HBM_GB_PER_S.items() if n in _gpu_name()), None)
    rows, seconds = [], {}
    for name, call, moved in calls:
        seconds[name] = rig.time(call)
        speed = moved / seconds[name] / 1e9
        share = "" if nominal is None else f"{speed / nominal:.0%}"
        rows.append(
            (
                name,
                f"{moved / 1e6:.0f}",
                f"{seconds[name] * 1e3:.3f}",
                f"{speed:.4g}",
                f"{speed / copied:.0%}",
                share,
            )
        )
    rig.lines += [
        f"{_wide_tokens(rig):,} tokens of 1,536 channels (Wan 2.1 1.3B), residuals and body "
        "bfloat16, hidden states float32; not TensorRT's kernels. A copy by torch moves "
        f"{copied:.4g} GB/s.",
        "",
    ]
    columns = (
        "graph",
        "MB read and written",
        "ms",
        "GB/s",
        "of torch's copy",
        "of the card's figure",
    )
    rig.table(columns, rows)
    around = seconds["head"] + seconds["finish"]
    computed = around + 30 * seconds["block"] + seconds["delta"]
    reused = {k: around + seconds[f"reuse, {k} residuals"] for k in MIXED}
    rig.table(
        ("residuals mixed", "reused step, ms", "step of 30 blocks, ms", "reused / computed"),
        [
            (k, f"{s * 1e3:.2f}", f"{computed * 1e3:.0f}", f"{s / computed:.2%}")
            for k, s in reused.items()
        ],
    )


def _copy_speed(rig: Rig) -> float:
    """Return GB/s that a copy inside the device's memory reads and writes."""
    import torch

    a = torch.zeros(1 << (20 if rig.feigned else 30), dtype=torch.uint8, device=rig.device)
    b = torch.zeros_like(a)
    seconds = rig.time(type("Copy", (), {"run": lambda self: b.copy_(a)})())
    return 2 * a.nbytes / seconds / 1e9


def offload_14b(rig: Rig) -> None:
    """Weights of 14B geometry through two slabs: what arrives, how fast, beside what is computed."""
    import torch

    from freewheel.engines import TensorSpec
    from freewheel.runtime.offload import HostBlock, OffloadedWeights

    blocks = 3 if rig.feigned else BLOCKS_14B
    shapes = (
        {n: (s[0] // 64, s[1] // 64) for n, s in BLOCK_14B.items()} if rig.feigned else BLOCK_14B
    )
    shapes = {n: tuple(max(1, d) for d in s) for n, s in shapes.items()}
    began = time.perf_counter()

    def read(names: Any) -> HostBlock:
        block = int(names[0].split(".", 1)[0])
        return HostBlock(
            {
                n: torch.full(shapes[n.split(".", 1)[1]], float(block), dtype=torch.bfloat16)
                for n in names
            },
            pinned=True,
        )

    seen: list[Any] = []
    tokens = torch.ones(
        4096, shapes["ffn.up"][1], dtype=torch.bfloat16, device=rig.device
    )  # few enough for a block to take about as long as its copy
    is_working = False

    class Checking:
        """An engine that reads one number of each weight, and multiplies by some where asked to."""

        inputs: ClassVar = {n: TensorSpec("bfloat16", shape) for n, shape in shapes.items()}

        def bind(self, bindings: Mapping[str, Any]) -> Any:
            def run(self: Any) -> None:
                seen.append(torch.stack([t.flatten()[-1].float() for t in bindings.values()]))
                for name in ("up", "to_q") * 6 if is_working else ():
                    weight = next(t for n, t in bindings.items() if name in n)
                    torch.matmul(tokens, weight.t())

            return type("Call", (), {"run": run})()

    def timed(calls: Any) -> float:
        began = time.perf_counter()
        for call in calls:
            call.run()
        rig.synchronize()
        return time.perf_counter() - began

    with rig.on_stream():
        weights = OffloadedWeights(rig.device, read, streamed=True)
        patterns = {n: "{block}." + n for n in shapes}
        calls = [weights.bind(Checking(), {}, patterns, b) for b in range(blocks)]
        rig.synchronize()
        prepared = time.perf_counter() - began
        timed(calls)
        copies = timed(calls)
        is_working = True
        resident = Checking().bind(
            {n: torch.zeros(s, dtype=torch.bfloat16, device=rig.device) for n, s in shapes.items()}
        )
        timed([resident])
        work = timed([resident] * blocks)
        del seen[-blocks - 1 :]
        both = timed(calls)
    right = all(bool((row == i % blocks).all()) for i, row in enumerate(t.cpu() for t in seen))
    size = sum(2 * s[0] * s[1] for s in shapes.values())
    rig.table(
        ("blocks", "GB in host memory", "s to read and lock", "GB on the device",
         "weights as they should be"),
        [(blocks, f"{blocks * size / 1e9:.2f}", f"{prepared:.1f}",
          f"{weights.resident_bytes() / 1e9:.2f}", right)],
    )  # fmt: skip
    rig.table(
        ("one pass over all blocks", "s", "GB/s of weights"),
        [
            ("copies alone", f"{copies:.3f}", f"{blocks * size / copies / 1e9:.1f}"),
            ("work alone, weights on the device", f"{work:.3f}", ""),
            ("both", f"{both:.3f}", f"{blocks * size / both / 1e9:.1f}"),
        ],
    )
    hidden = (copies + work - both) / min(copies, work)
    rig.lines += [
        f"Of the shorter of copying and computing, {hidden:.0%} is hidden behind the other.",
        "",
    ]
    if not right:
        rig.failures.append("a block computed from another block's weights")


def host_cost(rig: Rig) -> None:
    """What the host spends on a step, and would spend on setting addresses anew each call."""
    session = rig.session(check_finite=False)
    for _ in steps(rig, session, "off"):
        pass
    context = rig.home.contexts[-1]
    names = [*context._engine._inputs, *context._engine._outputs]
    import real_bindings

    real = real_bindings.bindings(real_bindings.NEWEST)
    began = time.perf_counter()
    for _ in range(1000):
        real.Dims([1, 2, 3])  # a call of the binding of like cost
    per_call = (time.perf_counter() - began) / 1000
    per_step = per_call * 30 * 27
    rig.lines += [
        f"A call of the bindings takes {per_call * 1e6:.2f} µs; one context per engine, addresses set anew "
        f"for 30 blocks of about 27 tensors, would cost the host {per_step * 1e6:.0f} µs a step "
        f"(this engine: {len(names)} tensors).",
        "",
    ]


SECTIONS: tuple[tuple[str, Callable[[Rig], None]], ...] = (
    ("Policies in every way of driving them", policies_in_every_way),
    ("Hand-off with the default stream", default_stream_hand_off),
    ("Several sessions at once", several_sessions),
    ("Inside the step loop", counts_in_the_loop),
    ("A step at real size", step_at_real_size),
    ("A step at real size, fused", step_at_real_size_fused),
    ("Offloading 14B geometry", offload_14b),
    ("Host cost", host_cost),
)
NOT_SHOWN = """
## What only TensorRT itself can show

- that its kernels are right and how fast they are: here torch operations computed every graph;
- that its contexts take the memory they announce, and that capture of its own kernels succeeds;
- building on a GPU: timing caches, tactic choice, hardware compatibility, tiling;
- TensorRT-RTX's compilation on the device and its cache. This GPU's architecture it does not know.
"""


class CudaRig(Rig):
    """The rig on a GPU."""

    def pause(self, cycles: int) -> None:
        self.home.device.longest_pause = cycles

    def on_stream(self) -> Any:
        import torch

        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def as_kernels(self) -> Any:
        return contextlib.nullcontext()

    def time(self, call: Any) -> float:
        import torch

        for _ in range(3):
            call.run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED):
            call.run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / TIMED

    def watch(self, loop: Callable[[], Any]) -> tuple[int, int, int]:
        """Count allocations outside the stand-in, copies to and from the host, the largest's bytes."""
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        inside, enqueue = [0], type(self.home.device).enqueue

        def counted(device: Any, *given: Any) -> None:
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            enqueue(device, *given)
            inside[0] += torch.cuda.memory_stats()["allocation.all.allocated"] - before

        type(self.home.device).enqueue = counted  # type: ignore[method-assign]  # for this loop
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        try:
            with torch.profiler.profile(activities=kinds) as profile:
                loop()
                torch.cuda.synchronize()
        finally:
            type(self.home.device).enqueue = enqueue  # type: ignore[method-assign]
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - before - inside[0]
        path = self.folder / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "DtoD" not in e["name"]]
        sizes = [int(e["args"]["bytes"]) for e in copies]
        return made, len(sizes), max(sizes, default=0)


class RehearsedRig(Rig):
    """The rig on the feigned GPU, which refuses a race instead of waiting for one to show."""

    def pause(self, cycles: int) -> None:
        pass

    def on_stream(self) -> Any:
        return self.feigned.on(self.feigned.new_stream())

    @contextlib.contextmanager
    def as_kernels(self) -> Iterator[None]:
        """Have torch compile for the CPU, unseen: a kernel's own operations are its own affair."""
        import torch
        from torch.utils._python_dispatch import _disable_current_modes

        feigned, torch.cuda.is_available = torch.cuda.is_available, lambda: False
        try:
            with _disable_current_modes():
                yield
        finally:
            torch.cuda.is_available = feigned

    def time(self, call: Any) -> float:
        began = time.perf_counter()
        call.run()
        return time.perf_counter() - began

    def watch(self, loop: Callable[[], Any]) -> tuple[int, int, int]:
        self.feigned.reset_counts()
        loop()
        counts = self.feigned.counts
        return counts["allocations"], counts["copies"], self.feigned.largest


def run(
    folder: Path, rehearse: bool, minutes: float, report: Path | None, only: list[str] | None
) -> int:
    """Run every section, each in a process of its own; return the exit code."""
    began = time.perf_counter()
    report = report or ROOT / ("out/rig-rehearsal.md" if rehearse else "docs/gpu-report.md")
    report.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    failed = 0
    with report.with_suffix(".log").open("w", encoding="utf-8") as log:
        for index, (title, section) in enumerate(SECTIONS):
            if only and not any(part in title for part in only):
                continue
            lines += [f"## {title}", ""]
            left = 60 * minutes - (time.perf_counter() - began)
            if left <= 0:
                lines += ["Not run: no time was left.", ""]
                failed += 1
                continue
            start = time.perf_counter()
            limit = None if rehearse else min(left, SECTION_SECONDS)
            told, faults = _apart(folder, rehearse, index, limit, log)
            failed += len(faults)
            lines += told + [f"- **failed**: {text.strip()}" for text in faults]
            lines += ["", f"{section.__doc__} {time.perf_counter() - start:.0f} s.", ""]
            print(f"{title}: {'FAILED' if faults else 'ok'}", flush=True)
            _write(report, lines, rehearse)
    return 1 if failed else 0


def _apart(
    folder: Path, rehearse: bool, index: int, seconds: float | None, log: Any
) -> tuple[list[str], list[str]]:
    """Run one section in a process of its own; return its lines and failures."""
    answer = folder / f"section-{index}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "run", str(folder), "--section", str(index)]
    command += ["--rehearse"] if rehearse else []
    try:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [], [f"took more than {seconds:.0f} s"]
    if not answer.is_file():
        return [], [f"its process ended with exit code {done.returncode}; see the log"]
    found = json.loads(answer.read_text(encoding="utf-8"))
    return found["lines"], found["failures"]


def run_section(folder: Path, rehearse: bool, index: int) -> None:
    """Run one section here, and leave its lines and failures for the process that asked."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if rehearse:
        from host_device import PLACE, HostDevice
        from torch_program import TorchProgram

        device: Any = HostDevice(make_program=lambda model: TorchProgram(model, PLACE))
        place, make = PLACE, RehearsedRig
    else:
        from cuda_device import CudaDevice

        place, make = torch.device("cuda", 0), CudaRig
        torch.cuda.set_device(place)
        device = CudaDevice(place)
    with stand_in(device, rehearsed=rehearse, bindings=folder / "bindings") as home:
        from freewheel.engines.tensorrt import TensorRT

        made = TensorRT.__init__
        TensorRT.__init__ = lambda self, **given: made(self, **{"device": place, **given})  # type: ignore[method-assign]
        _delay_copies(device)
        rig = make(folder, home, place, device if rehearse else None)
        try:
            SECTIONS[index][1](rig)
        except Exception:  # what it found so far still tells something
            traceback.print_exc()
            rig.failures.append(traceback.format_exc(limit=-4))
        TensorRT.__init__ = made  # type: ignore[method-assign]
    text = json.dumps({"lines": rig.lines, "failures": rig.failures})
    (folder / f"section-{index}.json").write_text(text, encoding="utf-8")


def _delay_copies(device: Any) -> None:
    """Have copies of offloaded weights begin late, too."""
    from freewheel.runtime.offload import HostBlock

    copy_to = HostBlock.copy_to

    def late(block: Any, slab: Any) -> None:
        device.pause()
        copy_to(block, slab)

    HostBlock.copy_to = late  # type: ignore[method-assign]  # this process does nothing else


def _write(report: Path, lines: list[str], rehearse: bool) -> None:
    """Write what there is; a machine may go at any time."""
    report.parent.mkdir(parents=True, exist_ok=True)
    what = "# What ran on a GPU" if not rehearse else "# Rehearsal on a CPU: says nothing of GPUs"
    head = [
        what,
        "",
        f"Written by `python tests/gpu/rig.py run`: {_machine()}. No TensorRT: a stand-in "
        "checks its protocol and torch computes the graphs.",
        "",
    ]
    report.write_text("\n".join(head + lines) + NOT_SHOWN, encoding="utf-8")


def _machine() -> str:
    import torch

    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        found.insert(0, f"{_gpu_name()}, {memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    return ", ".join(found)


def _gpu_name() -> str:
    import torch

    is_there = torch.version.cuda and torch.cuda.is_available()
    return str(torch.cuda.get_device_name(0)) if is_there else ""


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # graphs and plain runs alike
    main()

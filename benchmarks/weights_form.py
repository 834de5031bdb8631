# SPDX-License-Identifier: Apache-2.0
"""Measure what weights as graph inputs cost against weights inside the engines.

Builds a random transformer of each size in both forms and times the body of a computed step.
All forms and backends of a size run in turn within every round, so that a drift of the machine's
speed hits them alike, and forms swap places from round to round.

    python benchmarks/weights_form.py --out out/weights_form
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from freewheel.bundle.dims import derive_dims
from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.graphs.groups import block_bytes
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.dtypes import Precision
from freewheel.engines import backend
from freewheel.runtime.block_tables import BlockTables
from freewheel.runtime.body import Body
from freewheel.runtime.buffers import allocate
from freewheel.runtime.model import LoadedModel
from freewheel.runtime.settings import config_entries

Form = Literal["inputs", "baked"]
FORMS: tuple[Form, ...] = get_args(Form)
WARM_UP_RUNS = 3
DEMO_CONFIG = Path(__file__).parent.parent / "models" / "shapes_wan" / "transformer" / "config.json"


@dataclass(frozen=True)
class Case:
    """One model size.

    Attributes:
        name: Row label.
        config: Of the transformer; its weights are random.
        latents: (frames, height, width) of the latents, each measured on the same bundles.
        text_tokens: Length of the prompt.
        rounds: Timed runs of each form and backend.
    """

    name: str
    config: Mapping[str, Any]
    latents: tuple[tuple[int, int, int], ...]
    text_tokens: int
    rounds: int


@dataclass
class Row:
    """What one size and backend gave.

    Attributes:
        case: Size.
        backend: Backend.
        tokens: Of the hidden states.
        blocks: In the body.
        block_bytes: Weights of one block.
        seconds: Form → median seconds of a computed body.
        best_seconds: Form → least seconds; what is left of a busy machine's noise.
        ratio: Median over rounds of inputs / baked seconds; above 1, baked is faster.
        ratio_quartiles: 25th and 75th percentile of the same.
        difference: Relative L2 distance between the forms' results.
        compile_seconds: Form → seconds of compiling the body's engines.
        engine_bytes: Form → bytes of the body's engines, links to weight files not counted.
    """

    case: str
    backend: str
    tokens: int
    blocks: int
    block_bytes: int
    seconds: dict[str, float]
    best_seconds: dict[str, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    difference: float
    compile_seconds: dict[str, float]
    engine_bytes: dict[str, int]


def cases(rounds: int | None) -> list[Case]:
    """Return the demo, also at one frame, and two blocks of Wan 1.3B at one frame of 480 × 832."""
    demo = {k: v for k, v in json.loads(DEMO_CONFIG.read_text()).items() if not k.startswith("_")}
    wide = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2}
    return [
        Case("demo", demo, ((1, 12, 12), (5, 12, 12)), 16, rounds or 101),
        Case("wan 1.3B, 2 blocks", wide, ((1, 60, 104),), 512, rounds or 15),
    ]


def save_checkpoint(case: Case, folder: Path) -> None:
    """Write a random transformer of this size in diffusers layout."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**case.config)
    model.save_pretrained(folder)  # type: ignore[attr-defined]  # diffusers hides it


def build_form(
    checkpoint: Path,
    out: Path,
    form: Form,
    backends: Sequence[str],
    precision: Precision,
    group_blocks: int | None,
) -> Bundle:
    """Build a bundle in one form for all backends."""
    request = BuildRequest(
        model=str(checkpoint),
        out=out,
        backends=[backend(name) for name in backends],
        configs=config_entries(["off"], lambda text: None),
        precision=precision,
        weights=form,
        group_blocks=group_blocks,
    )
    build(plan(request))
    return Bundle(out)


class BoundBody:
    """The body of one bundle on one backend, bound to buffers of its own."""

    def __init__(
        self, bundle: Bundle, backend_name: str, latent: tuple[int, int, int], text_tokens: int
    ) -> None:
        self.model = LoadedModel(bundle, backend_name)
        graphs, config = bundle.manifest.graphs, bundle.manifest.checkpoint.config
        frames, height, width = latent
        sizes = {"batch": 1, "frames": frames, "height": height, "width": width}
        dims = derive_dims(bundle.manifest, sizes)
        self.tokens = dims["tokens"]
        generator = torch.Generator().manual_seed(0)
        entries = {n: e for n, e in graphs["block"].inputs.items() if "text_tokens" not in e.shape}
        hidden = entries["hidden"]
        entries |= {"hidden_even": hidden, "hidden_odd": hidden}
        shared = allocate(entries, dims, self.model.device)
        for name in sorted(entries):
            shared[name].copy_(torch.randn(shared[name].shape, generator=generator))
        prompt = torch.randn(1, text_tokens, config["text_dim"], generator=generator)
        tables = BlockTables(self.model, {}, by_prompt=False)
        self.body = Body(self.model, "cond", shared, {"text_states": prompt}, dims, tables)

    def run(self) -> float:
        """Run the body once; return its seconds."""
        began = time.perf_counter()
        self.body.run()
        self.model.backend.synchronize()
        return time.perf_counter() - began

    @property
    def result(self) -> Tensor:
        """The hidden states after the body, float32."""
        return self.body.results["hidden"].float()


def measure(
    case: Case,
    folder: Path,
    backends: Sequence[str],
    precision: Precision = "float32",
    group_blocks: int | None = None,
) -> list[Row]:
    """Build ``case`` in both forms below ``folder`` and time its body on every backend."""
    say(f"{case.name}: build both forms")
    save_checkpoint(case, folder / "checkpoint")
    bundles = {
        form: build_form(
            folder / "checkpoint", folder / form, form, backends, precision, group_blocks
        )
        for form in FORMS
    }
    return [row for latent in case.latents for row in time_bodies(case, latent, bundles, backends)]


def time_bodies(
    case: Case,
    latent: tuple[int, int, int],
    bundles: Mapping[Form, Bundle],
    backends: Sequence[str],
) -> list[Row]:
    """Time both forms on every backend, in turn."""
    bodies = {
        (name, form): BoundBody(bundles[form], name, latent, case.text_tokens)
        for name in backends
        for form in FORMS
    }
    for body in bodies.values():
        for _ in range(WARM_UP_RUNS):
            body.run()
    seconds: dict[tuple[str, Form], list[float]] = {key: [] for key in bodies}
    for index in range(case.rounds):
        for name in backends:
            for form in FORMS if index % 2 else reversed(FORMS):
                seconds[name, form].append(bodies[name, form].run())
        say(f"{case.name}: round {index + 1} of {case.rounds}")
    return [describe(case, name, bundles, bodies, seconds) for name in backends]


def describe(
    case: Case,
    name: str,
    bundles: Mapping[Form, Bundle],
    bodies: Mapping[tuple[str, Form], BoundBody],
    seconds: Mapping[tuple[str, Form], Sequence[float]],
) -> Row:
    """Summarise what was timed on one backend."""
    manifest = bundles["inputs"].manifest
    pairs = zip(seconds[name, "inputs"], seconds[name, "baked"], strict=True)
    ratios = [inputs / baked for inputs, baked in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    expected = bodies[name, "inputs"].result
    distance = (bodies[name, "baked"].result - expected).norm() / expected.norm()
    return Row(
        case=case.name,
        backend=name,
        tokens=bodies[name, "inputs"].tokens,
        blocks=manifest.block_count,
        block_bytes=block_bytes(manifest.stages[0], manifest.graphs, manifest.tensors),
        seconds={form: statistics.median(seconds[name, form]) for form in FORMS},
        best_seconds={form: min(seconds[name, form]) for form in FORMS},
        ratio=statistics.median(ratios),
        ratio_quartiles=(quartiles[0], quartiles[2]),
        difference=float(distance),
        compile_seconds={form: compile_seconds(bundles[form], name) for form in FORMS},
        engine_bytes={form: engine_bytes(bundles[form], name) for form in FORMS},
    )


def body_graphs(bundle: Bundle) -> list[str]:
    """Return the graphs that the body runs when no feature is wanted."""
    stages = bundle.manifest.stages
    return [g for s in stages for g in ([e.graph for e in s.groups] or [s.block])]


def compile_seconds(bundle: Bundle, name: str) -> float:
    """Return the seconds that compiling the body's engines took."""
    engines = bundle.engines(name)
    assert engines is not None, "the bundle was built for this backend"
    return sum(engines.seconds[graph] for graph in body_graphs(bundle))


def engine_bytes(bundle: Bundle, name: str) -> int:
    """Return the bytes of the body's engines; a link to a weight file costs none."""
    engines = bundle.engines(name)
    assert engines is not None, "the bundle was built for this backend"
    files = (
        file
        for graph in body_graphs(bundle)
        for file in bundle.path(engines.files[graph]).rglob("*")
        if file.is_file()
    )
    return sum(f.stat().st_size for f in files if f.stat().st_nlink == 1)


def machine() -> dict[str, Any]:
    """Name what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "diffusers", "onnxruntime", "openvino")},
    }


def markdown(rows: Sequence[Row], context: Mapping[str, Any]) -> str:
    """Return the table, with the machine below it."""
    lines = [
        "| size | tokens | blocks | MB per block | backend | inputs, s | baked, s "
        "| inputs / baked (quartiles) | of the best runs | relative difference "
        "| compile s, inputs / baked | engines MB, inputs / baked |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.ratio_quartiles
        compiled, stored = row.compile_seconds, row.engine_bytes
        cells = [
            row.case,
            f"{row.tokens:,}",
            row.blocks,
            f"{row.block_bytes / 1e6:.1f}",
            row.backend,
            f"{row.seconds['inputs']:.4f}",
            f"{row.seconds['baked']:.4f}",
            f"{row.ratio:.3f} ({low:.3f}–{high:.3f})",
            f"{row.best_seconds['inputs'] / row.best_seconds['baked']:.3f}",
            f"{row.difference:.0e}",
            f"{compiled['inputs']:.2f} / {compiled['baked']:.2f}",
            f"{stored['inputs'] / 1e6:.1f} / {stored['baked'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", ", ".join(f"{k} {v}" for k, v in context.items()) + "."]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Tell progress on stderr."""
    sys.stderr.write(text + "\n")


def main() -> None:
    """Measure, print the table, write it and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/weights_form"), help="folder")
    parser.add_argument("--case", choices=["demo", "wan"], help="one of the sizes; default: both")
    parser.add_argument("--backend", action="append", choices=["onnxruntime", "openvino"])
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--group-blocks", type=int, help="blocks per baked engine")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 101 and 15")
    arguments = parser.parse_args()
    backends = arguments.backend or ["onnxruntime", "openvino"]
    rows: list[Row] = []
    for case in cases(arguments.rounds):
        if arguments.case and not case.name.startswith(arguments.case):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = (backends, arguments.precision, arguments.group_blocks)
            rows += measure(case, Path(folder), *options)
        gc.collect()
    context = {**machine(), "precision": arguments.precision}
    table = markdown(rows, context)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = {"schema_version": 1, "machine": context, "rows": [asdict(r) for r in rows]}
    (arguments.out / "weights_form.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.out / "weights_form.md").write_text(table)
    sys.stdout.write(table)


if __name__ == "__main__":
    main()

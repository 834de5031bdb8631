# SPDX-License-Identifier: Apache-2.0
"""What comes of each DiT of the installed diffusers: a bundle, a cut, or the reason why not.

``python tests/compiler/cut/verdicts.py`` writes `docs/reference/models.md` (``--engines`` alone: what
TensorRT-RTX makes of the graphs); ``test_verdicts.py`` holds it to be true.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parent))

import diffusers
from cases import Case, row_and_config
from held_out import HELD_OUT
from pipelines import CALLED, MODULAR, PIPELINES, UNCUT, UNLEARNT, UNTRIED
from small_configs import CASES
from tensorrt_engines import engines_of
from test_declare import error
from test_prove import OTHER

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.declare import _Declaration
from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.prove import eager, random_inputs, random_weights
from freewheel.compiler.cut.row import SIZES, Input, Row
from freewheel.core.errors import ExportError

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "models.md"
OTHERS = json.loads((Path(__file__).parent / "others.json").read_text())
"""Class without a row → config, and inputs as ``"changes dimensions; dtype fill=values"``."""

NO_DIT = {
    "DreamLiteTransformer2DModel",
    "MiniMaxMusic3RVQDepthDecoder",
    "PriorTransformer",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
}
"""Classes among diffusers' transformers that denoise nothing, or are layers of a U-Net."""

LONGEST = 110

COUNT = re.compile(r"(\d+) of (\d+)")
"""What `engines_of` says of a class whose graphs are all compiled."""

OF_FAMILIES = {
    "FluxTransformer2DModel": ("FluxPipeline",),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline",),
    "LTXVideoTransformer3DModel": ("LTXPipeline",),
    "WanTransformer3DModel": ("WanImageToVideoPipeline", "WanPipeline"),
}
"""Class → pipelines that the tests of its family (`tests/compiler/models`) attach a bundle to."""


@dataclass(frozen=True)
class Verdict:
    """One class's verdict: one of `KINDS`, the reason, and what TensorRT-RTX makes of the graphs."""

    kind: str
    why: str = ""
    engines: str = ""


KINDS = {
    "bundle": "built, and equal on ONNX Runtime and OpenVINO",
    "words": "equal when its graphs are called as a session calls them; no bundle is built",
    "refused": "cut, but a bundle has no word for something",
    "not equal": "cut, but not equal at every size",
    "not traced": "torch can't trace it",
    "not tried": "no small model of it was made",
}


def classes() -> list[str]:
    """Return every DiT of the installed diffusers."""
    named = {
        name: getattr(diffusers, name)
        for name in dir(diffusers)
        if name.endswith(("Model", "Transformer"))
    }
    return sorted(
        name
        for name, one in named.items()
        if inspect.isclass(one)
        and one.__module__.startswith("diffusers.models.transformers.")
        and issubclass(one, diffusers.ModelMixin)
        and name not in NO_DIT
    )


def proof_of(model: str) -> tuple[Row, dict[str, Any]] | None:
    """Return a class's row and a small config; None if there is none."""
    row = row_of(model)
    if row is not None:
        return row, next(config for name, config in CASES.values() if name == model)
    held = next((both for both in HELD_OUT.values() if both[0].model == model), None)
    if held is not None or model not in OTHERS:
        return held
    entry = OTHERS[model]
    inputs = {name: _input(spelled) for name, spelled in entry["inputs"].items()}
    row = Row(model, inputs, multiples=entry.get("multiples", {}), whole=entry.get("whole", False))
    return row, entry["config"]


def _input(spelled: Any) -> Any:
    if isinstance(spelled, dict):
        return {name: _input(one) for name, one in spelled.items()}
    if isinstance(spelled, list):
        return [_input(one) for one in spelled]
    if not isinstance(spelled, str):
        return spelled
    words, _, options = spelled.partition("; ")
    changes, _, shape = words.partition(" ")
    fill: Any = "timestep" if changes == "run" else "normal"
    dtype = "int64" if changes == "shape" else "float32"
    for option in options.split():
        if option.startswith("fill="):
            fill = option.removeprefix("fill=")
            fill = int(fill) if fill.isdigit() else fill
        else:
            dtype = option
    return Input(changes, shape, dtype, fill)  # type: ignore[arg-type]  # a word of the file


def verdict(model: str) -> Verdict:
    """Cut a class and compare it with itself."""
    found = proof_of(model)
    if found is None:
        return Verdict("not tried")
    row, config = found
    model_class = getattr(diffusers, model)
    whole = random_weights(model_class.from_config(config).eval())
    weights = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    kind = "not traced"
    try:
        cut = cut_model(row, model_class, config)
        kind = "refused"
        one = Case(row, whole, weights, lambda: cut)
        settings: Any = whole.config
        declared = _Declaration(row, cut, settings, "float32", lambda name: "float32").declared()
    except ExportError as reason:
        return Verdict(kind, _short(reason.what.removeprefix("torch can't trace its forward: ")))
    except Exception as reason:
        return Verdict(kind, _short(f"{type(reason).__name__}: {reason}"))
    try:
        worst = max(error(one, declared, counts) for counts in (SIZES, OTHER) if _runs(one, counts))
    except Exception as reason:
        return Verdict("not equal", _short(f"{type(reason).__name__}: {reason}"))
    if worst > 1e-5:
        return Verdict("not equal", f"relative L2 {worst:.0e}")
    if not row.name:
        return Verdict("words")
    held_out = row_of(model) is None
    return Verdict("bundle", "its row is held out of the table" if held_out else "")


def _runs(one: Case, counts: Mapping[str, int]) -> bool:
    """Say whether the model itself runs at a size."""
    config: Any = one.model.config
    try:
        eager(one.row, one.model, random_inputs(one.row, config, one.row.sizes(config, counts)))
    except Exception:
        return False
    return True


def _short(text: str) -> str:
    line = " ".join(text.replace("|", "/").replace("`", "'").split("\n")[0].split())
    line = re.sub(r"<eval_with_key>\.\d+", "generated code", line)
    return f"`{line if len(line) <= LONGEST else line[:LONGEST] + '…'}`"


def engines(model: str) -> str:
    """Return how many attentions TensorRT-RTX fuses, or why it does not compile every graph."""
    proof = proof_of(model)
    assert proof is not None, "a bundle has a row"
    found = engines_of(proof[0])
    return found if COUNT.fullmatch(found) else _short(found)


def attached() -> dict[str, list[str]]:
    """Return class → the pipelines that tests attach a bundle of it to."""
    found = {model: set(pipelines) for model, pipelines in OF_FAMILIES.items()}
    named = {name: pipeline for name, (pipeline, _, _) in PIPELINES.items()}
    for name, pipeline in {**named, **dict.fromkeys(MODULAR, "its modular pipeline")}.items():
        found.setdefault(row_and_config(name)[0].model, set()).add(pipeline)
    return {model: sorted(pipelines) for model, pipelines in found.items()}


def without_rows() -> dict[str, str]:
    """Return class → what comes of it where the table has no row of it; of its cases the best.

    `test_learn.py` shows that it is true.
    """
    found = {"WanTransformer3DModel": "cut"}
    for name in CALLED:
        kind = "cut"
        if name in (*UNCUT, *UNTRIED):
            kind = "learnt"
        elif name in UNLEARNT:
            kind = "not learnt"
        model = row_and_config(name)[0].model
        found[model] = min(found.get(model, kind), kind, key=("cut", "learnt", "not learnt").index)
    return found


def page(verdicts: Mapping[str, Verdict]) -> str:
    """Return the page."""
    classes_of = Counter(v.kind for v in verdicts.values())
    kinds = "\n".join(f"| {kind} | {classes_of[kind]} | {text} |" for kind, text in KINDS.items())
    pipelines, alone = attached(), without_rows()
    rows = "\n".join(
        f"| `{model}` | {v.kind} | {v.why} | {v.engines} | {', '.join(pipelines.get(model, []))}"
        f" | {alone.get(model, '')} |"
        for model, v in verdicts.items()
    )
    counts = [found for v in verdicts.values() if (found := COUNT.fullmatch(v.engines))]
    fused = [found for found in counts if found[1] == found[2]]
    watched = Counter(alone.values())
    return PAGE_HEAD.format(
        version=diffusers.__version__,
        kinds=kinds,
        rows=rows,
        attached=len(pipelines),
        fused=len(fused),
        watched=len(alone),
        cut=watched["cut"],
        learnt=watched["learnt"],
    )


PAGE_HEAD = """\
# Models

Every DiT of diffusers {version}, and what comes of [cutting it](../explanation/cutting.md): a small
random model is cut, and compared with itself at two sizes. `tests/compiler/cut/verdicts.py` writes
this page; `pytest -m nightly tests/compiler/cut/test_verdicts.py` shows that it is true, and
`test_bundles.py` beside it that the bundles are.

| verdict | classes | means |
|---|--:|---|
{kinds}

Every policy runs on each of the bundles, and {attached} classes are attached to their pipelines.

TensorRT-RTX compiles every graph of {fused} classes, in bfloat16 for compute capability 8.9 and as wide as
a released model (`released_configs.py`), and fuses every attention of their blocks. The column counts the
attentions in one block of each kind, and again where a graph also returns what policies look at; what
is no bundle has none. No GPU ran these engines.

Without its row a class can be [learnt from its pipeline's calls](../how-to/add-a-family.md)
(`build --trace-with`). Of the {watched} classes whose pipelines tests watch, {cut} are cut so and equal
to themselves, {learnt} are learnt and not cut (most need a patch, or more blocks than are tried), and
the others are refused with the argument or the call that no row tells.

| class | verdict | why | attentions that TensorRT-RTX fuses | pipelines that `attach` was run in | without its row |
|---|---|---|---|---|---|
{rows}
"""


def listed() -> dict[str, Verdict]:
    """Return the page's verdicts."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): Verdict(*(cell.strip() for cell in row[2:5])) for row in rows}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("models", nargs="*", help="classes to look at; all by default")
    parser.add_argument("--engines", action="store_true", help="leave verdicts as they are")
    options = parser.parse_args()
    found = listed()
    for name in options.models or classes():
        one = found[name] if options.engines and name in found else verdict(name)
        if one.kind == "bundle":
            one = replace(one, engines=engines(name))
        found = {**listed(), name: one}
        print(name, one, flush=True)
        PAGE.write_text(page({n: found[n] for n in classes() if n in found}))


if __name__ == "__main__":
    main()

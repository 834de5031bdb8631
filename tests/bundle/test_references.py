# SPDX-License-Identifier: Apache-2.0
"""A manifest whose parts contradict each other is refused before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.reader import parse_manifest
from freewheel.core.errors import BundleError

TABLE = {"dtype": "float32", "shape": ["steps", 3]}
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def data(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "tests/fuzz/corpus/manifest/whole").read_text())


def group(first: int, count: int) -> dict[str, Any]:
    return {"graph": "block", "first": first, "count": count}


def skip(place: int, stream: str = "hidden", count: int = 3) -> dict[str, Any]:
    return {"hidden_skip": {"stream": stream, "blocks": [place] * count}}


ROWS = {"dtype": "float32", "shape": ["steps", 4]}


def modulate(data: dict[str, Any], **changed: Any) -> None:
    """Give the first stage's blocks a graph of the timesteps."""
    graph = {"inputs": {"temb": ROWS}, "outputs": {"timestep_proj": ROWS}, **changed}
    data["graphs"]["modulation"] = {**data["graphs"]["context"], **graph, "runs": "run_block"}
    data["stages"][0]["modulation"] = "modulation"


def reads(value: str, count: int) -> dict[str, list[str]]:
    return {"timestep_proj": [value] * count}


def sequence(**changes: Any) -> dict[str, Any]:
    whole = {
        "sums": {},
        "shared": {"hidden": ["tokens"]},
        "blocks": {},
        "rows": "delta",
        "joined": None,
        "policies": {},
    }
    return whole | changes


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda d: d.update(sequence=sequence(rows="rows")), "'sequence.rows' names 'rows'"),
        (lambda d: d.update(sequence=sequence(joined="none")), "'sequence.joined' names 'none'"),
        (lambda d: d.update(sequence=sequence(blocks={"block": [{"graph": "block"}]})), "blocks.block' is not parts"),
        (lambda d: d.update(sequence=sequence(policies={"off": ["a", "b"]})), "'sequence.policies.off' names"),
        (lambda d: d.update(sequence=sequence(sums={"joint": ["tokens"]})), "'sequence.sums.joint' is no sum"),
        (lambda d: d["graphs"].pop("reuse"), "'graphs.reuse' is missing"),
        (lambda d: d["graphs"].update(text_encoder=d["graphs"]["prompt"]), "'vocabulary_size' is missing"),
        (lambda d: d["graphs"]["delta"]["outputs"].pop("residual"), "lack 'residual'"),
        (lambda d: d["policies"]["off"]["spec"].update(kept=["gram"]), "'policies.off.spec.kept' has 'gram'"),
        (lambda d: d["graphs"]["timestep"]["outputs"].update(odd=TABLE), "table 'odd'"),
        (lambda d: d["signals"]["temb"].update(value="nothing"), "'signals.temb.value' 'nothing'"),
        (lambda d: d.update(stages=[]), "'stages' is empty"),
        (lambda d: d["stages"][0].update(block="blok"), "names graph 'blok'"),
        (lambda d: d.update(stages=d["stages"] * 2000), "more than 4096 blocks"),
        (lambda d: d["stages"][0].update(groups=[group(0, 1), group(0, 1)]), "don't cover"),
        (lambda d: d["stages"][0].update(groups=[group(0, 2)]), "don't cover"),
        (lambda d: d["stages"][0].update(skips=skip(0)), "block 0, which gives none before"),
        (lambda d: d["stages"].append(d["stages"][0] | {"skips": skip(0, count=1)}), "1 blocks for 3"),
        (lambda d: d["stages"].append(d["stages"][0] | {"skips": skip(0, "none")}), "reads 'none' of block 0"),
        (lambda d: d["stages"].append(d["stages"][0] | {"skips": skip(3)}), "block 3, which gives none"),
        (lambda d: d.update(stages=[d["stages"][0] | {"groups": [group(0, 3)]}, d["stages"][0] | {"skips": skip(0)}]),
         "'hidden' of block 0, which gives none before"),
        (lambda d: d["stages"][0].update(reads=reads("temb", 1)), "names 1 values for 3 blocks"),
        (lambda d: d["stages"][0].update(reads={"none": ["temb"] * 3}), "reads.none' is no input of the stage's"),
        (lambda d: d["stages"][0].update(reads=reads("hidden", 3)), "names 'hidden', which nothing gives before"),
        (lambda d: d["stages"][0].update(modulation="none"), "names graph 'none', which is not there"),
        (lambda d: d["stages"][0].update(modulation="context"), "runs as 'prompt_block', not as 'run_block'"),
        (lambda d: modulate(d, inputs={}), "takes no table"),
        (lambda d: modulate(d, inputs={"hidden": ROWS}), "takes 'hidden', which nothing gives before the steps"),
        (lambda d: modulate(d, outputs={"odd": ROWS}), "gives 'odd', which graph 'block' does not take"),
        (lambda d: d["policies"]["off"].update(graph="decide.of"), "'policies.off.graph'"),
        (lambda d: d["policies"]["teacache"]["spec"].update(distance="none"), "names no state"),
        (lambda d: d["policies"]["off"]["spec"]["history"].update(parameter="x"), "names no parameter"),
        (lambda d: d.update(default_config="none"), "'default_config' names no config"),
        (lambda d: d.update(engines=[]), "'engines' is empty"),
        (lambda d: d.update(engines=d["engines"] * 2), "has backend 'onnxruntime' twice"),
        (lambda d: d["samplers"][0].update(file="weights/none"), "is not among the files"),
        (lambda d: d["inputs"].update(latent=d["inputs"].pop("latents")), "'inputs' lack 'latents'"),
        (lambda d: d["inputs"].update(audio_latents=d["inputs"]["latents"]), "lack 'audio_model_output'"),
        (lambda d: d["graphs"]["reuse"]["outputs"].update(audio_hidden_out=TABLE), "lack 'audio_hidden'"),
        (lambda d: d["graphs"]["reuse"]["outputs"].update(audio_hidden_out=TABLE), "lack 'audio_residual'"),
        (lambda d: d["graphs"]["reuse"]["outputs"].update(audio_hidden_out=TABLE), "lack 'audio_history'"),
    ],
)  # fmt: skip
def test_a_name_that_leads_nowhere_is_named(data: dict[str, Any], edit: Edit, fault: str) -> None:
    parse_manifest(json.dumps(data).encode(), "manifest.json")
    edit(data)
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(data).encode(), "manifest.json")
    assert caught.value.where == "manifest.json"
    assert fault in caught.value.what
    assert caught.value.hint == "build the bundle again"


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["stages"][0].update(count=10**9),
        lambda d: d["stages"][0].update(first=2**62),
        lambda d: d.update(feature_block=10**9),
        lambda d: d["policies"]["off"]["spec"]["history"].update(maximum=2**30),
        lambda d: d["policies"]["off"]["spec"]["history"].update(depth=2**30),
        lambda d: d["policies"]["teacache"]["spec"]["state"]["distance"].update(shape=[2**20]),
        lambda d: d["policies"]["teacache"]["spec"]["parameters"]["threshold"].update(shape=[-1]),
        lambda d: d["policies"]["teacache"]["spec"]["parameters"]["threshold"].update(
            shape=[1] * 9
        ),
        lambda d: d["graphs"]["head"]["inputs"]["latents"].update(shape=[1] * 9),
        lambda d: d["graphs"]["head"]["inputs"]["latents"].update(shape=[2**60]),
        lambda d: d["graphs"]["head"]["inputs"]["latents"].update(dtype="nn"),
        lambda d: d["samplers"][0].update(window=2**40),
        lambda d: d["samplers"][0].update(steps=[2**40]),
        lambda d: next(iter(d["tensors"].values())).update(bytes=2**62),
        lambda d: next(iter(d["files"].values())).update(bytes=2**64),
    ],
)
def test_absurd_sizes_and_counts_are_refused(data: dict[str, Any], edit: Edit) -> None:
    edit(data)
    with pytest.raises(BundleError, match=r"1 faults|2 faults"):
        parse_manifest(json.dumps(data).encode(), "manifest.json")

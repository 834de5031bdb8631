# SPDX-License-Identifier: Apache-2.0
"""Blocks' modulation is made once per run, for all steps: each step reads its row of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "compiler" / "cut"))
sys.path.insert(0, str(Path(__file__).parents[1] / "compiler" / "models"))
from bundles import TOLERANCE, save
from cases import Case, case
from chain import relative

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.prove import eager, random_inputs
from freewheel.compiler.cut.row import SIZES
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

NAMES = ("qwen_image", "sd35")
"""Modulation of the timestep alone, which branches share; of timestep and pooled prompt, in three templates."""

TIMESTEPS = (900.0, 500.0, 100.0)


@pytest.fixture(scope="module", params=NAMES)
def one(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


@pytest.fixture(scope="module")
def build(
    one: Case, tmp_path_factory: pytest.TempPathFactory, build_bundle: Callable[..., Bundle]
) -> Callable[..., Bundle]:
    folder = save(one.model, tmp_path_factory.mktemp("modulated") / "model")
    return lambda **options: build_bundle(folder, ("onnxruntime",), policies=[], **options)


@pytest.fixture(scope="module")
def bundle(build: Callable[..., Bundle]) -> Bundle:
    return build()


def given_to(one: Case, seed: int) -> dict[str, Any]:
    """Return what `forward` is given, a batch of two."""
    config: Any = one.model.config
    return random_inputs(one.row, config, one.row.sizes(config, SIZES), seed=seed)


def expected(one: Case, model: nn.Module, raw: Mapping[str, Any], timestep: float) -> Tensor:
    (name,) = (
        n for n, declared in one.row.inputs.items() if getattr(declared, "changes", "") == "run"
    )
    batch = torch.full_like(raw[name], timestep / one.row.timestep_scale)
    return eager(one.row, model, {**raw, name: batch})[0]


def inputs_of(bundle: Bundle, raw: Mapping[str, Any], runs: str) -> dict[str, Tensor]:
    values = {n: raw[i.argument] for n, i in bundle.manifest.inputs.items() if i.runs == runs}
    return {
        n: torch.arange(v, dtype=torch.float32) if isinstance(v, int) else v
        for n, v in values.items()
    }


def check_run(
    one: Case, session: Session, bundle: Bundle, model: nn.Module, timesteps: tuple[float, ...]
) -> None:
    """Hold each step of two branches to the model at that step's timestep."""
    session.begin(torch.tensor(timesteps))
    prompts = {"cond": given_to(one, 1), "uncond": given_to(one, 2)}
    for step, timestep in enumerate(timesteps):
        for branch, raw in prompts.items():
            session.set_prompt(branch, inputs_of(bundle, raw, "prompt"))
            found = session.step(branch, step, inputs_of(bundle, raw, "step"))
            wanted = expected(one, model, raw, timestep)
            assert relative(found, wanted) < TOLERANCE, (branch, step)


def test_every_step_of_every_branch_reads_its_own_row(one: Case, bundle: Bundle) -> None:
    session = Session(Model(bundle))
    check_run(one, session, bundle, one.model, TIMESTEPS)
    check_run(one, session, bundle, one.model, TIMESTEPS[1:])


def test_no_step_reads_a_weight_of_modulation(one: Case, bundle: Bundle) -> None:
    graphs, hoisted = bundle.manifest.graphs, set()
    for stage in bundle.manifest.stages:
        assert stage.modulation is not None
        assert graphs[stage.modulation].runs == "run_block"
        hoisted |= set(graphs[stage.modulation].weights.values())
    assert any("norm1" in name or "mod.1" in name for name in hoisted)
    for name, graph in graphs.items():
        assert graph.runs == "run_block" or hoisted.isdisjoint(graph.weights.values()), name
    assert not graphs["modulate"].weights


def test_graphs_run_once_per_run_and_where_they_see_it_per_prompt(
    one: Case, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(bundle)
    bind, bound = model.bind, Counter[str]()

    def counted(graph: str, *args: Any, **kwargs: Any) -> Any:
        bound[bundle.manifest.graphs[graph].runs] += 1
        return bind(graph, *args, **kwargs)

    monkeypatch.setattr(model, "bind", counted)
    session = Session(model)
    blocks = sum(stage.count for stage in bundle.manifest.stages)
    stage = bundle.manifest.stages[0]
    sees_prompt = bundle.manifest.reads_prompt(str(stage.modulation))
    assert sees_prompt == (one.row.name == "sd3")
    per_run = 2 * blocks if sees_prompt else blocks
    check_run(one, session, bundle, one.model, TIMESTEPS)
    assert bound["run_block"] == per_run
    check_run(one, session, bundle, one.model, TIMESTEPS)
    assert bound["run_block"] == per_run
    check_run(one, session, bundle, one.model, TIMESTEPS[:2])
    assert bound["run_block"] == 2 * per_run
    raw = given_to(one, 3)
    session.begin(torch.tensor(TIMESTEPS[:2]))
    session.set_prompt("cond", inputs_of(bundle, raw, "prompt"))
    session.step("cond", 0, inputs_of(bundle, raw, "step"))
    assert bound["run_block"] == 2 * per_run + (blocks if sees_prompt else 0)


def test_tables_that_could_not_be_made_are_made_by_the_next_run(
    one: Case, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(bundle)
    session, bind = Session(model), model.bind
    check_run(one, session, bundle, one.model, TIMESTEPS[:2])

    def fails(graph: str, *args: Any, **kwargs: Any) -> Any:
        if bundle.manifest.graphs[graph].runs == "run_block":
            raise MemoryError
        return bind(graph, *args, **kwargs)

    monkeypatch.setattr(model, "bind", fails)
    with pytest.raises(MemoryError):
        check_run(one, session, bundle, one.model, TIMESTEPS)
    monkeypatch.setattr(model, "bind", bind)
    check_run(one, session, bundle, one.model, TIMESTEPS)


def test_other_weights_of_modulation_make_other_tables(one: Case, bundle: Bundle) -> None:
    """As a LoRA's, which are merged into the weights of a session."""
    graph = bundle.manifest.graphs[str(bundle.manifest.stages[0].modulation)]
    name = next(n for n in graph.weights.values() if n.endswith(".weight")).replace("{block}", "0")
    weights = {name: one.weights[name] + torch.randn_like(one.weights[name]) / 4}
    model = deepcopy(one.model)
    model.load_state_dict({**model.state_dict(), **weights})
    loaded = Model(bundle)
    check_run(one, Session(loaded), bundle, one.model, TIMESTEPS[:1])
    check_run(one, Session(loaded.with_weights(weights)), bundle, model, TIMESTEPS[:1])


def test_weights_in_host_memory_make_the_same(one: Case, bundle: Bundle) -> None:
    model = Model(bundle, options=DeviceOptions(offload=True))
    check_run(one, Session(model), bundle, one.model, TIMESTEPS)


def test_groups_of_baked_blocks_read_a_row_for_each(
    one: Case, build: Callable[..., Bundle]
) -> None:
    baked = build(weights="baked", group_blocks=2)
    check_run(one, Session(Model(baked)), baked, one.model, TIMESTEPS[:2])

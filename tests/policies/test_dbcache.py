"""DBCache's decisions and configs, and those of cache-dit's own class where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from freewheel.configs.load import parse_config
from freewheel.core.errors import ConfigError
from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting, GuardSetting


def decisions(signal: list[Any], threshold: float, **guard: int) -> str:
    setting = CacheSetting(
        policy="dbcache", parameters={"threshold": threshold}, guard=GuardSetting(**guard)
    )
    law = DecisionLoop.eager(setting, step_count=len(signal))
    seen = [np.broadcast_to(np.float32(value), (2, 3)).copy() for value in signal]
    return "".join("#" if law.decide(s).compute else "." for s in seen)


def test_change_counts_from_the_last_computed_step() -> None:
    assert decisions([1.00, 1.04, 1.08, 1.12, 1.16, 1.20], 0.1) == "#..#.."
    assert decisions([1.0] * 5, 0.0) == "#####"


def test_guard_limits_the_reuses() -> None:
    assert decisions([1.0] * 9, 0.1, first_exact=3) == "###......"
    assert decisions([1.0] * 9, 0.1, first_exact=2, max_consecutive=2) == "##..#..#."


def config(**keys: Any) -> CacheSetting:
    return parse_config({"feature_caching": "DBCache", **keys}, where="x.json").setting()


def test_config_has_cache_dits_keys() -> None:
    setting = config(
        Fn_compute_blocks=4,
        Bn_compute_blocks=2,
        residual_diff_threshold=0.12,
        max_warmup_steps=6,
        max_continuous_cached_steps=3,
        max_cached_steps=-1,
    )
    assert setting.parameters == {"first_blocks": 4, "last_blocks": 2, "threshold": 0.12}
    assert setting.guard == GuardSetting(first_exact=6, max_consecutive=3)
    assert config().guard == GuardSetting(first_exact=8), "cache-dit's warm-up"
    assert config(first_exact=2).guard == GuardSetting(first_exact=2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"Fn_compute_blocks": 0}, "'Fn_compute_blocks': found 0, expected greater than or equal"),
        (
            {"Bn_compute_blocks": -1},
            "'Bn_compute_blocks': found -1, expected greater than or equal",
        ),
        ({"max_cached_steps": 0}, "'max_cached_steps': found 0, expected -1 for no limit"),
        ({"warmup_interval": 2}, "'warmup_interval': found 2, expected 1: every step"),
        ({"max_accumulated_residual_diff_threshold": 2.0}, "the nearest is 'max_reused'"),
        ({"max_warmup_steps": 3, "first_exact": 2}, "one of 'max_warmup_steps' and 'first_exact'"),
        ({"Fn_compute_block": 2}, "did you mean 'Fn_compute_blocks'"),
    ],
)
def test_config_refuses_what_means_something_else(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**keys)
    assert message in str(caught.value)


def test_pairs_divide_the_body_as_the_decision_says() -> None:
    spec = policy_class("dbcache+taylorseer").spec
    given = spec.resolve({"first_blocks": 3, "last_blocks": 2})
    assert spec.always_run(given) == (3, 2)
    assert policy_class("firstblock").spec.always_run({}) == (1, 0)


@pytest.mark.parametrize(
    ("first", "threshold", "row", "most"), [(1, 0.08, -1, -1), (4, 0.24, 2, -1), (8, 0.5, -1, 9)]
)
def test_decides_as_cache_dits_own_class(first: int, threshold: float, row: int, most: int) -> None:
    manager = pytest.importorskip(
        "cache_dit.caching.cache_contexts.cache_manager",
        reason="pip install --no-deps --target out/peers cache-dit==1.5.3, on PYTHONPATH",
    )
    from cache_dit.caching.cache_contexts.cache_config import DBCacheConfig

    rng = np.random.default_rng(first)
    signals = np.cumsum(rng.standard_normal((40, 5, 8)) * 0.08, axis=0) + rng.standard_normal(
        (5, 8)
    )
    signals = signals.astype(np.float32)
    peer = manager.CachedContextManager("peer")
    peer.new_context(
        name="peer",
        cache_config=DBCacheConfig(
            residual_diff_threshold=threshold,
            max_warmup_steps=first,
            enable_separate_cfg=False,
            max_continuous_cached_steps=row,
            max_cached_steps=most,
        ),
    )
    peer.set_context("peer")
    expected = []
    for signal in signals:
        peer.mark_step_begin()
        reuses = peer.can_cache(torch.from_numpy(signal), prefix="Fn_residual")
        if reuses:
            peer.add_cached_step()
        else:
            peer.set_Fn_buffer(torch.from_numpy(signal), prefix="Fn_residual")
        expected.append(not reuses)
    keys = {
        "residual_diff_threshold": threshold,
        "max_warmup_steps": first,
        "max_continuous_cached_steps": row,
        "max_cached_steps": most,
    }
    law = DecisionLoop.eager(config(**keys), step_count=len(signals))
    assert [law.decide(s).compute for s in signals] == expected
    assert set(expected) == {True, False}

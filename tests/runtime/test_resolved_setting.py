"""A setting against a bundle: the signal that a policy gets, and whether its decisions fold."""

from __future__ import annotations

import pytest

from freewheel.bundle.manifest import Manifest, SignalEntry
from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.resolved_setting import resolve


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Bundle) -> Manifest:
    return tiny_bundle.manifest


@pytest.mark.parametrize(
    ("policy", "signal", "given", "is_folded"),
    [
        ("off", None, None, True),
        ("taylorseer", None, None, True),
        ("teacache", None, "temb", True),
        ("teacache", "temb", "temb", True),
        ("teacache", "modulated_input", "modulated_input", False),
        ("firstblock", None, "first_block_residual", False),
        ("easycache", None, "latents", False),
    ],
)
def test_a_policy_gets_the_wanted_signal_or_its_first(
    manifest: Manifest, policy: str, signal: str | None, given: str | None, is_folded: bool
) -> None:
    resolved = resolve(manifest, CacheSetting(policy=policy, signal=signal))
    assert resolved.signal_name == given
    assert resolved.is_folded == is_folded
    assert (resolved.signal is None) == (given is None)


def test_the_first_signal_that_the_model_gives_is_taken(manifest: Manifest) -> None:
    spec = manifest.policies["teacache"].spec
    last = spec.signals[-1]
    alone = manifest.model_copy(update={"signals": {last: manifest.signals[last]}})
    assert resolve(alone, CacheSetting(policy="teacache")).signal_name == last
    none = manifest.model_copy(update={"signals": {}})
    with pytest.raises(
        ConfigError, match=r"signal '\w+': can't be given .* on this model; use another policy"
    ):
        resolve(none, CacheSetting(policy="teacache"))


def test_a_policy_that_sees_content_does_not_fold_whatever_its_signal(manifest: Manifest) -> None:
    entry = manifest.policies["teacache"]
    assert isinstance(manifest.signals["temb"], SignalEntry)
    for update in ({"feature": "model_output"}, {"kept": ["gram"]}):
        seeing = entry.model_copy(update={"spec": entry.spec.model_copy(update=update)})
        changed = manifest.model_copy(update={"policies": {"teacache": seeing}})
        assert not resolve(changed, CacheSetting(policy="teacache", signal="temb")).is_folded


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (CacheSetting(policy="teacash"), "did you mean 'teacache'"),
        (CacheSetting(policy="teacache", signal="tembb"), "did you mean 'temb'"),
        (CacheSetting(policy="off", signal="temb"), "it takes no signal"),
        (CacheSetting(policy="teacache", parameters={"threshold": -1.0}), "outside"),
        (CacheSetting(policy="teacache", branches={"uncond": {"threshold": -1.0}}), "outside"),
    ],
)
def test_what_no_run_takes_is_refused(manifest: Manifest, setting: CacheSetting, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(manifest, setting)

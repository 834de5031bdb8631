# SPDX-License-Identifier: Apache-2.0
"""Read caching configs: JSON files, those that ship, and policies by name.

What of LightX2V's other keys is taken without effect, and what is refused, stands in `foreign.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, ValidationError

from ..core.errors import ConfigError, guess, nearest
from ..core.strict_json import parse_json
from ..policies import JOINT, POLICIES, config_kinds, is_policy, policy_config
from ..policies.config import CachingConfig
from .foreign import ABSENT_POLICIES, is_without_effect, refusals

__all__ = ["load_config", "parse_config", "read_configs", "read_object", "shipped_configs"]


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package: file stem → path, sorted by folder."""
    return {p.stem: p for p in sorted(Path(__file__).parent.rglob("*.json"))}


def load_config(path_or_name: str | Path) -> CachingConfig:
    """Read a caching config.

    Args:
        path_or_name: A JSON file; ``FILE#NAME`` for one of a calibration's configs; a shipped
            config's stem, with or without its folder; or a policy's name, for its defaults.

    Raises:
        ConfigError: no such file or name, or a file with faults (all of them in one error).
    """
    text = str(path_or_name)
    if is_policy(text):
        try:
            config = policy_config(text).of_policy()
        except ValidationError as error:
            raise ConfigError(
                f"caching config '{text}'",
                "needs a file: its tables come from a calibration",
                "write one with `freewheel calibrate`",
            ) from error
        config._name = text
        return config
    file, _, inner = text.partition("#")
    if inner:
        return _load_inner(Path(file), inner)
    shipped = shipped_configs()
    named = shipped | {f"{p.parent.name}/{stem}": p for stem, p in shipped.items()}
    path = Path(text)
    if not path.exists() and text.removesuffix(".json") in named:
        path = named[text.removesuffix(".json")]
    is_path = isinstance(path_or_name, Path) or path.exists() or path.suffix == ".json"
    if not is_path:
        raise ConfigError(
            f"caching config '{text}'",
            "is neither a file, nor a shipped config, nor a policy",
            nearest(text, [*POLICIES, *shipped]),
        )
    data = read_object(path)
    if "configs" in data and "feature_caching" not in data:
        known = ", ".join(data["configs"])
        raise ConfigError(str(path), "holds several configs", f"name one, '{path}#NAME': {known}")
    return parse_config(data, where=str(path), name=path.stem)


def read_configs(path: Path) -> dict[str, CachingConfig]:
    """Read all configs of a file that `freewheel calibrate` wrote, by name.

    Raises:
        ConfigError: the file can't be read, holds none, or one of them has faults.
    """
    return {n: parse_config(c, where=f"{path}#{n}", name=n) for n, c in _inner(path).items()}


def _load_inner(path: Path, name: str) -> CachingConfig:
    configs = _inner(path)
    if name not in configs:
        raise ConfigError(f"{path}, config '{name}'", "is not there", nearest(name, list(configs)))
    return parse_config(configs[name], where=f"{path}#{name}", name=name)


def _inner(path: Path) -> dict[str, dict[str, Any]]:
    """Return the configs of a calibration's file, unchecked."""
    configs = read_object(path).get("configs")
    if not isinstance(configs, dict) or not all(isinstance(c, dict) for c in configs.values()):
        raise ConfigError(str(path), "holds no 'configs'", "write one with `freewheel calibrate`")
    return configs


def parse_config(data: Mapping[str, Any], *, where: str, name: str = "") -> CachingConfig:
    """Check a config that was read from JSON.

    Args:
        data: Its keys and values.
        where: The file, for messages.
        name: What the config is to go by.

    Raises:
        ConfigError: unknown policy or key, wrong type or range; every fault of the file.
    """
    model, faults = _model_of(data)
    given = {k: v for k, v in data.items() if k not in model.model_fields}
    ignored = [k for k, v in given.items() if k in model.foreign or is_without_effect(k, v)]
    faults += [f"{_quoted(keys)}: {why}" for why, keys in refusals(given).items()]
    left = {k for keys in refusals(given).values() for k in keys} | set(ignored)
    hint = "correct these keys"
    config = None
    try:
        config = model.model_validate({k: v for k, v in data.items() if k not in left})
    except ValidationError as error:
        found = [e for e in error.errors() if e["loc"] != ("feature_caching",)]
        faults += [_fault(e, model) for e in found]
        if any(e["type"] == "extra_forbidden" for e in found):
            hint += f"; known: {', '.join(sorted(model.model_fields))}"
    if config is None or faults:
        raise ConfigError(where, _listed(faults), hint)
    config._name, config._ignored = name or config.policy, tuple(ignored)
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file can't be read, or holds something else.
    """
    try:
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            str(path), f"can't be read: {error.strerror}", "give an existing JSON file"
        ) from error
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}", "correct the file") from error
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"expected a JSON object, found {_shown(data)}")
    return data


def _model_of(data: Mapping[str, Any]) -> tuple[type[CachingConfig], list[str]]:
    """Pick the model; with an unknown policy, one that can still check the common keys."""
    kinds, unreadable = config_kinds()
    known = list(kinds)
    if "feature_caching" not in data:
        return _AnyPolicy, [f"'feature_caching': missing, expected one of {', '.join(known)}"]
    kind = data["feature_caching"]
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind], []
    if isinstance(kind, str) and JOINT in kind and is_policy(kind):
        try:
            return policy_config(kind), []
        except ConfigError as error:
            return _AnyPolicy, [f"'feature_caching': {error}"]
    if kind in ABSENT_POLICIES:
        does, near = ABSENT_POLICIES[kind]
        what = f"'{kind}', which {does}, is no policy here; the nearest is {near}"
        return _AnyPolicy, [f"'feature_caching': {what}"]
    hint = nearest(kind, known) if isinstance(kind, str) else f"known: {', '.join(known)}"
    hint = "; ".join((hint, *(f"left out: {error}" for error in unreadable)))
    return _AnyPolicy, [f"'feature_caching': found {_shown(kind)}, no such policy; {hint}"]


class _AnyPolicy(CachingConfig):
    """Stand-in for a policy that is not known: checks the common keys, lets the others pass."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    feature_caching: Any = None


def _fault(error: Mapping[str, Any], model: type[CachingConfig]) -> str:
    """Say field path, found value and expectation of one of pydantic's errors."""
    path = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        kinds = config_kinds()[0]
        owners = [kind for kind, m in kinds.items() if path in m.model_fields]
        if owners:
            own = get_args(model.model_fields["feature_caching"].annotation)[0]
            return f"'{path}': is a key of {' and '.join(owners)}, not of {own}"
        return f"'{path}': is not a known key{guess(path, list(model.model_fields))}"
    expected = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "too_long":
        expected = f"at most {error['ctx']['max_length']} values"
    if not path:
        return f"expected {expected}"
    return f"'{path}': found {_shown(error['input'])}, expected {expected}"


def _path(location: Iterable[int | str]) -> str:
    """Write ``("coefficients", "list[…]", 1, 0)`` as ``coefficients[1][0]``."""
    parts = [p for p in location if isinstance(p, int) or re.fullmatch(r"\w+", p)]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(faults: list[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults: " + "; ".join(faults)

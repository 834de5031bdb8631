# SPDX-License-Identifier: Apache-2.0
"""Make a transformer that is traced: without weights, and with two blocks of each run of equal ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

__all__ = ["block_lists", "skeleton"]

KEPT = 2
"""Blocks traced of a run of equal ones: what the second reads of the first, each reads of the one
before it."""


def skeleton(
    model_class: Any, config: Mapping[str, Any], whole: Collection[str] | None = ()
) -> tuple[nn.Module, dict[str, int]]:
    """Make a transformer whose weights have no storage, with two blocks of each run of equal ones.

    Args:
        model_class: A diffusers transformer.
        config: Its config.
        whole: Lists of blocks to leave as they are; None leaves all.

    Returns:
        The model, and block → number of blocks that it stands for. Blocks keep their names.
    """
    with _WeightsOnMeta():
        model = model_class.from_config(dict(config)).eval()
    runs = {} if whole is None else _shorten(model, whole)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=torch.float32)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return model, runs


class _WeightsOnMeta(torch.overrides.TorchFunctionMode):
    """Layers allocate weights by `torch.empty`; buffers, which are computed, keep their values."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists that may hold blocks, by path: those that lie in no other list."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{p}." for p in found)):
            found[path] = module
    return found


def _shorten(model: nn.Module, whole: Collection[str]) -> dict[str, int]:
    """Drop all blocks but two of each run of equal ones."""
    runs: dict[str, int] = {}
    for path, blocks in block_lists(model).items():
        if path in whole:
            continue
        for _, same in groupby(list(blocks._modules.items()), key=lambda item: _form(item[1])):
            names = [name for name, _ in same]
            if len(names) > KEPT:
                runs[f"{path}.{names[KEPT - 1]}"] = len(names) - KEPT + 1
                for name in names[KEPT:]:
                    del blocks._modules[name]
    return runs


def _form(module: nn.Module | None) -> tuple[Any, ...]:
    """Return what makes two blocks equal before they are traced: classes, settings, weights' shapes."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        (
            name,
            type(part),
            [(k, v) for k, v in vars(part).items() if isinstance(v, plain) and k != "training"],
            [(k, tuple(p.shape)) for k, p in part.named_parameters(recurse=False)],
        )
        for name, part in (module.named_modules() if module is not None else ())
    )

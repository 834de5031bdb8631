# SPDX-License-Identifier: Apache-2.0
"""A transformer without weights that carries what diffusers and PEFT know of its adapters.

Every verb of diffusers' adapter interface runs on it as written there. What its layers say then is
merged into the bundle's weights: PEFT's factors and scales of a LoRA, and what is no LoRA by PEFT itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Parameter

from ...bundle.reader import Bundle
from ...bundle.scales import KEPT, scale_name
from ...core.errors import RequestError
from ..merge import LowRank, merged_weight

__all__ = ["Adapters", "check_transformer", "hollow_transformer"]

_NOTHING = torch.zeros(1)
"""All that lies behind the parameters of a transformer without weights; never written to."""

DOWN, UP = "lora_A.weight", "lora_B.weight"
"""A pair's factors, by diffusers' names."""

COMPARED_VALUES = 64
"""Of each tensor; a fine-tune or a fused LoRA changes the first values of what it changes."""


class Adapters:
    """The transformer that stands in a pipeline, and the weights that its adapters lead to."""

    def __init__(self, bundle: Bundle, prefix: str, standing: Any) -> None:
        """Make the transformer, with the adapters of the one that it replaces.

        Args:
            bundle: Base weights.
            prefix: What precedes the names of this expert's tensors.
            standing: The pipeline's transformer so far, or None.

        Raises:
            RequestError: ``standing`` has adapters, and the bundle's weights are baked.
        """
        self._bundle, self._prefix = bundle, prefix
        self.module: Any = hollow_transformer(bundle)
        for part in self.module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = _stand_in(parameter.shape)
        # Layer → its module and base parameters before `fuse_lora`, to go back to them exactly.
        self._before: dict[str, tuple[Any, dict[str, Parameter]]] = {}
        self._own: dict[str, int] = {}  # weights fused for good → their identity
        self.module.load_lora_adapter = self._load_lora_adapter
        self.module.fuse_lora = self._fuse_lora
        self.module.load_state_dict = self._load_state_dict
        if standing is not None and getattr(standing, "peft_config", None):
            self._take_over(standing)

    def _take_over(self, standing: Any) -> None:
        self._refuse_baked(f"LoRA '{next(iter(standing.peft_config))}'")
        self._refuse_float8("pipeline", [name for name, _ in _tuner_layers(standing)])
        for name, layer in _tuner_layers(standing):
            base = {id(p): _stand_in(p.shape) for p in layer.get_base_layer().parameters()}
            taken = copy.deepcopy(layer, base).to("cpu", torch.float32)
            _put(self.module, name, taken)
        self.module.peft_config = copy.deepcopy(standing.peft_config)
        self.module._hf_peft_config_loaded = True

    def copied(self) -> Adapters:
        """Return the same with adapters and fused weights of its own."""
        self._settle()
        other = Adapters(self._bundle, self._prefix, None)
        for name, layer in _tuner_layers(self.module):
            base = {id(p): p for p in layer.get_base_layer().parameters() if _is_stand_in(p)}
            _put(other.module, name, copy.deepcopy(layer, base))
        for name, parameter in self._materialised():
            place, _, part = name.rpartition(".")
            if not isinstance(module := other.module.get_submodule(place), BaseTunerLayer):
                module._parameters[part] = copy.deepcopy(parameter)
        if self.has_adapters:
            other.module.peft_config = copy.deepcopy(self.module.peft_config)
            other.module._hf_peft_config_loaded = True
        for name, (_, before) in self._before.items():
            other._before[name] = other.module.get_submodule(name), before
        theirs = dict(other._materialised())
        for name, parameter in self._materialised():
            if self._own.get(name) == id(parameter):
                other._own[name] = id(theirs[name])
        return other

    def state(self) -> tuple[Any, ...]:
        """Return what distinguishes the weights of `merged` now from those of another time."""
        self._settle()
        layers = tuple(
            (
                name,
                layer.disable_adapters,
                tuple(layer.merged_adapters),
                tuple(layer.active_adapters),
                tuple(getattr(layer, "scaling", {}).items()),
                tuple((id(p), p._version) for p in layer.parameters()),
            )
            for name, layer in _tuner_layers(self.module)
        )
        real = tuple((n, id(p)) for n, p in self._materialised())
        return layers + real

    @property
    def has_adapters(self) -> bool:
        """Whether an adapter is loaded, active or not."""
        return bool(getattr(self.module, "peft_config", None))

    def fuse_for_good(self) -> None:
        """Make what is active part of the base weights, and forget the adapters."""
        merged = self.merged()
        self.module.unload_lora()
        self._settle()
        for name, value in merged.items():
            self._replace(name.removeprefix(self._prefix), value)
        self._own = {n: id(p) for n, p in self._materialised()}

    def add(self, differences: Mapping[str, Tensor], scale: float) -> None:
        """Add differences, times a scale, to the base weights; for good with the next `fuse_for_good`.

        Args and raises: as `checked`.
        """
        standing = {n.replace(".base_layer", ""): p for n, p in self.module.named_parameters()}
        for name, difference in self.checked(differences).items():
            base = self._base(name, standing[name])
            self._replace(name, (base.float() + scale * difference.float()).to(base.dtype))

    def checked(self, differences: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return differences, each of which can be added to the bundle's weight of its name.

        Args:
            differences: By parameter of the model, of its shape.

        Raises:
            RequestError: the bundle has no such weight, or has it baked or in float8.
        """
        if differences:
            self._refuse_baked("LoRA")
        self._refuse_float8("LoRA", [name.removesuffix(".weight") for name in differences])
        for name in differences:
            self._refuse_unknown(name)
        return differences

    def _replace(self, name: str, value: Tensor) -> None:
        """Put a parameter in the place of the one of that name."""
        place, _, part = name.rpartition(".")
        module = self.module.get_submodule(place)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        base._parameters[part] = _frozen(value)

    @property
    def is_fused(self) -> bool:
        """Whether weights were fused by others than `fuse_for_good`."""
        self._settle()
        return any(self._own.get(n) != id(p) for n, p in self._materialised())

    def merged(self) -> dict[str, Tensor]:
        """Return private copies of the weights that differ from the bundle's, by tensor name.

        Raises:
            RequestError: a weight has another shape than the bundle's.
        """
        self._settle()
        found = {self._prefix + n: p.detach() for n, p in self._materialised()}
        for name, layer in _tuner_layers(self.module):
            if layer.disable_adapters or layer.merged_adapters:
                continue
            active = [a for a in layer.active_adapters if _has_adapter(layer, a)]
            if not active:
                continue
            merge = self._merged_loras if _is_lora(layer, active) else self._merged_by_peft
            found |= {f"{self._prefix}{n}": t for n, t in merge(name, layer, active).items()}
        return found

    def _merged_loras(self, name: str, layer: Any, active: Sequence[str]) -> dict[str, Tensor]:
        """Return a layer's base parameters with plain LoRAs and DoRAs, by their names."""
        loras = [_factors(name, layer, adapter) for adapter in active]
        changes = [
            LowRank(lora[UP], lora[DOWN], lora.get("lora_magnitude_vector.weight"))
            for lora in loras
        ]
        base = layer.get_base_layer()
        found = {
            f"{name}.weight": merged_weight(self._base(f"{name}.weight", base.weight), changes)
        }
        biases = [lora["lora_B.bias"] for lora in loras if "lora_B.bias" in lora]
        if biases:
            bias = self._base(f"{name}.bias", base.bias)
            found[f"{name}.bias"] = (bias.float() + sum(biases)).to(bias.dtype)
        return found

    def _merged_by_peft(self, name: str, layer: Any, active: Sequence[str]) -> dict[str, Tensor]:
        """Return a layer's base parameters with adapters of any kind, by their names."""
        base, before = layer.get_base_layer(), self._base_parameters(layer)
        try:
            self._fill(name, base)
            layer.merge(adapter_names=list(active))
            return {
                f"{name}.{n}": self._as_bundled(f"{name}.{n}", p)
                for n, p in base.named_parameters(recurse=False)
            }
        finally:
            layer.merged_adapters = []
            base._parameters.update(before)

    def factors(self) -> dict[str, Tensor]:
        """Return what `merged` adds, as factors with every scale inside, by diffusers' names.

        ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``: a pair whose product is added to the
        weight; ``NAME.lora_B.bias``: what is added to the bias; ``NAME.lora_magnitude_vector.weight``:
        the length that each row of the sum is given. All float32 and contiguous.

        Raises:
            RequestError: an adapter is of a kind that isn't written so, or changes a weight that
                the bundle doesn't have.
        """
        found: dict[str, Tensor] = {}
        for name, layer in _tuner_layers(self.module):
            for adapter in (a for a in layer.active_adapters if _has_adapter(layer, a)):
                found |= {f"{name}.{n}": t for n, t in _factors(name, layer, adapter).items()}
        for name in sorted(found):
            self._refuse_unknown(_weight_name(name))
        return {n: t.detach().float().contiguous() for n, t in found.items()}

    def _settle(self) -> None:
        """Go back exactly to the weights before `fuse_lora` where diffusers has unfused them."""
        for _, layer in _tuner_layers(self.module):
            if layer.disable_adapters and layer.merged_adapters:
                layer.unmerge()  # as PEFT's own forward does
        for name, (layer, before) in list(self._before.items()):
            if not layer.merged_adapters:
                module = self.module.get_submodule(name)
                base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                base._parameters.update(before)
            elif self.module.get_submodule(name) is layer:
                continue
            del self._before[name]  # unloaded: fused for good, or never

    def _fuse_lora(
        self,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        self._settle()
        self.module.lora_scale, self.module._safe_fusing = lora_scale, safe_fusing
        for name, layer in _tuner_layers(self.module):  # one in float32 at a time
            base = layer.get_base_layer()
            if name not in self._before:
                self._before[name] = layer, self._base_parameters(layer)
                self._fill(name, base)
            self.module._fuse_lora_apply(layer, adapter_names)
            for part, parameter in base.named_parameters(recurse=False):
                base._parameters[part] = _frozen(self._as_bundled(f"{name}.{part}", parameter))
        self._settle()

    def _load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Check what diffusers' `load_lora_adapter` would warn of, then load as it does.

        Raises:
            RequestError: the LoRA does not fit, or the bundle's weights are baked.
        """
        name = options.get("adapter_name") or "default"
        place = f"LoRA '{name}'"
        self._refuse_baked(place)
        if not isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            raise RequestError(
                place, "is given as a file", "load it with pipe.load_lora_weights(FILE)"
            )
        state = dict(pretrained_model_name_or_path_or_dict)
        if prefix is not None:
            loadable = getattr(options.get("_pipeline"), "_lora_loadable_modules", ())
            others = [k for k in state if k.split(".")[0] not in (prefix, *loadable)]
            if others:
                module = others[0].rpartition(".lora")[0] or others[0].rpartition(".")[0]
                raise RequestError(
                    f"{place}, module '{module}'",
                    f"is not part of '{prefix}'",
                    "give a LoRA of this model",
                )
            state = {
                k.removeprefix(f"{prefix}."): v
                for k, v in state.items()
                if k.startswith(f"{prefix}.")
            }
        self._check_fit(place, state)
        type(self.module).load_lora_adapter(
            self.module,
            pretrained_model_name_or_path_or_dict,
            prefix=prefix,
            hotswap=hotswap,
            **options,
        )

    def _refuse_baked(self, place: str) -> None:
        if self._bundle.manifest.weights == "baked":
            raise RequestError(
                place,
                "can't be added: this bundle's weights are inside its engines",
                "build the bundle with --weights inputs",
            )

    def _check_fit(self, place: str, state: Mapping[str, Tensor]) -> None:
        """Raise `RequestError` where a module is not the model's, or has other sizes."""
        modules = {n.replace(".base_layer", ""): m for n, m in self.module.named_modules()}
        names = sorted({k.rpartition(".lora_")[0] for k in state if ".lora_" in k})
        missing = [n for n in names if n not in modules]
        if missing:
            raise RequestError(
                place,
                f"{len(missing)} of {len(names)} modules are not in the model, such as '{missing[0]}'",
                "give a LoRA of this model",
            )
        for name in names:
            down, up = (state.get(f"{name}.lora_{side}.weight") for side in "AB")
            if down is None or up is None:
                raise RequestError(
                    f"{place}, module '{name}'", "has one half of a pair", "use a whole file"
                )
            rows, columns = modules[name].weight.flatten(1).shape
            if up.shape[0] != rows or down.flatten(1).shape[1] != columns:
                raise RequestError(
                    f"{place}, module '{name}'",
                    f"updates [{up.shape[0]}, {down.flatten(1).shape[1]}], the weight is [{rows}, {columns}]",
                    "give a LoRA of this model",
                )
        self._refuse_float8(place, names)

    def _refuse_unknown(self, name: str) -> None:
        """Raise `RequestError` where a parameter of the model is no weight of the bundle."""
        if self._prefix + name not in self._bundle.manifest.tensors:
            raise RequestError(
                f"LoRA, parameter '{name}'",
                "is changed, and is no weight of the bundle",
                "give a LoRA of this model",
            )

    def _refuse_float8(self, place: str, modules: Iterable[str]) -> None:
        """Raise `RequestError` where graphs take a module's weight in float8.

        Rounded to float8 again, most of a small change would be lost.
        """
        tensors = self._bundle.manifest.tensors
        for name in modules:
            entry = tensors.get(f"{self._prefix}{name}.weight")
            if entry is not None and entry.dtype == KEPT:
                raise RequestError(
                    f"{place}, module '{name}'",
                    f"has its weight in {KEPT}, which no LoRA changes",
                    "build the bundle with --float8 convert",
                )

    def _load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take adapters' tensors; what would change the model itself has nowhere to go."""
        base = {n for n, p in self.module.named_parameters() if _is_stand_in(p)}
        changed = sorted(base & state_dict.keys())
        if changed:
            raise RequestError(
                f"transformer, weight '{changed[0]}'",
                "is to be replaced, but the bundle holds the weights",
                "save the changed transformer and build a bundle of it",
            )
        return type(self.module).load_state_dict(self.module, state_dict, strict, assign)

    def _base_parameters(self, layer: Any) -> dict[str, Parameter]:
        return dict(layer.get_base_layer().named_parameters(recurse=False))

    def _fill(self, name: str, base: Any) -> None:
        """Put float32 copies of the bundle's weights where stand-ins are."""
        for part, parameter in list(base.named_parameters(recurse=False)):
            value = self._base(f"{name}.{part}", parameter)
            base._parameters[part] = _frozen(value.to(torch.float32, copy=True))

    def _base(self, name: str, parameter: Parameter) -> Tensor:
        """Return a parameter without adapters: the bundle's, or what was fused into it.

        Raises:
            RequestError: it has another shape than the bundle's.
        """
        value = parameter.detach()
        if _is_stand_in(parameter):
            value = self._bundle.tensor(self._prefix + name)
        if value.shape != parameter.shape:
            raise RequestError(
                f"transformer, '{name}'",
                f"is {list(parameter.shape)} with its adapter, {list(value.shape)} in the bundle",
                "build a bundle of the changed transformer",
            )
        return value

    def _as_bundled(self, name: str, value: Tensor) -> Tensor:
        entry = self._bundle.manifest.tensors[self._prefix + name]
        return value.detach().to(getattr(torch, entry.dtype))

    def _materialised(self) -> Iterator[tuple[str, Parameter]]:
        own = {id(p) for _, layer in _tuner_layers(self.module) for p in _adapter_parameters(layer)}
        for name, parameter in self.module.named_parameters():
            # What tells diffusers device and dtype has no elements.
            if parameter.numel() and id(parameter) not in own and not _is_stand_in(parameter):
                yield name.replace(".base_layer", ""), parameter


def hollow_transformer(bundle: Bundle) -> Any:
    """Return the transformer that a bundle was built from, on ``meta``, without its weights."""
    checkpoint = bundle.manifest.checkpoint
    transformer_class = getattr(diffusers, checkpoint.transformer_class)
    with torch.device("meta"):
        module: Any = transformer_class.from_config(dict(checkpoint.config))
    return module.requires_grad_(False).eval()


def check_transformer(bundle: Bundle, prefix: str, standing: Any) -> None:
    """Compare a pipeline's transformer with the bundle: class, config, names, shapes, values.

    Args:
        bundle: What is attached.
        prefix: What precedes the names of the expert's tensors.
        standing: A transformer of diffusers with its weights.

    Raises:
        RequestError: they differ; the message says in what.
    """
    checkpoint = bundle.manifest.checkpoint
    hint = "attach to the pipeline that the bundle was built from, or build a bundle of this one"
    found = type(standing).__name__
    if found != checkpoint.transformer_class:
        raise RequestError(
            "pipeline, 'transformer'",
            f"is {found}, the bundle was built from {checkpoint.transformer_class}",
            hint,
        )
    for _, layer in _tuner_layers(standing):
        if layer.merged_adapters:
            raise RequestError(
                f"pipeline, adapter '{layer.merged_adapters[0]}'",
                "is fused into the weights that the bundle replaces",
                "call pipe.unfuse_lora() before attach, and pipe.fuse_lora() after it",
            )
    config = FrozenDict(standing.config)
    for key, wanted in checkpoint.config.items():
        if not key.startswith("_") and key in config and _plain(config[key]) != _plain(wanted):
            raise RequestError(
                f"pipeline, transformer config '{key}'",
                f"is {config[key]}, the bundle was built with {wanted}",
                hint,
            )
    adapted = {id(p) for _, layer in _tuner_layers(standing) for p in _adapter_parameters(layer)}
    tensors = bundle.manifest.tensors
    for name, parameter in standing.named_parameters():
        plain = prefix + name.replace(".base_layer", "")
        if id(parameter) in adapted or plain not in tensors or parameter.device.type == "meta":
            continue
        place = f"pipeline, transformer weight '{name}'"
        if list(parameter.shape) != tensors[plain].shape:
            raise RequestError(
                place, f"is {list(parameter.shape)}, the bundle's is {tensors[plain].shape}", hint
            )
        ours = _first_values(bundle, plain)
        theirs = parameter.detach().flatten()[:COMPARED_VALUES].cpu()
        # PEFT's unfusing subtracts what it added, and rounds.
        if not _same_values(theirs, ours, rounded=".base_layer" in name):
            raise RequestError(
                place, "holds other values than the bundle's: a fine-tune, or a fused LoRA", hint
            )


def _first_values(bundle: Bundle, name: str) -> Tensor:
    """Return the values of a weight that are compared, float8 multiplied by its scale."""
    tensor = bundle.tensor(name)
    if tensor.dtype == getattr(torch, KEPT):
        scale = bundle.tensor(scale_name(name))
        tensor = tensor[:COMPARED_VALUES].float() * scale[:COMPARED_VALUES]
    return tensor.flatten()[:COMPARED_VALUES]


def _same_values(first: Tensor, second: Tensor, *, rounded: bool) -> bool:
    """Tell whether values are equal in the coarser of two dtypes.

    Args:
        first: Any float dtype.
        second: Any float dtype, of the same shape.
        rounded: Allow a few roundings of the largest value.
    """
    if rounded:
        epsilon = max(torch.finfo(first.dtype).eps, torch.finfo(second.dtype).eps)
        allowed = 8 * epsilon * float(second.abs().max())
        return torch.allclose(first.float(), second.float(), rtol=0.0, atol=allowed)
    if first.dtype.itemsize == second.dtype.itemsize and first.dtype != second.dtype:
        return torch.allclose(first.float(), second.float(), rtol=2**-7, atol=1e-6)
    coarse = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(first.to(coarse), second.to(coarse))


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _tuner_layers(module: Any) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer))


def _put(module: Any, name: str, layer: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _adapter_parameters(layer: Any) -> Iterator[Parameter]:
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return (p for p in layer.parameters() if id(p) not in base)


def _factors(name: str, layer: Any, adapter: str) -> dict[str, Tensor]:
    """Return one layer's factors, without its name; see `Adapters.factors`."""
    if adapter not in getattr(layer, "lora_A", ()):
        raise RequestError(
            f"LoRA, module '{name}'",
            f"is adapted by {type(layer).__name__}, which is no plain LoRA",
            "merge it into the checkpoint and build that",
        )
    down, up, scale = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    found = {DOWN: down.weight, UP: up.weight.float() * scale}
    if up.bias is not None:
        found["lora_B.bias"] = up.bias.float() * scale
    if adapter in layer.lora_magnitude_vector:
        found["lora_magnitude_vector.weight"] = layer.lora_magnitude_vector[adapter].weight
    return {n: t.detach() for n, t in found.items()}


def _is_lora(layer: Any, adapters: Iterable[str]) -> bool:
    """Whether adapters of a layer are pairs, with or without a magnitude for each row (DoRA)."""
    variants = getattr(layer, "lora_variant", {})
    return all(
        adapter in getattr(layer, "lora_A", ())
        and (adapter not in variants or adapter in layer.lora_magnitude_vector)
        for adapter in adapters
    ) and not getattr(layer, "fan_in_fan_out", False)


def _weight_name(factor: str) -> str:
    """Return which parameter a factor changes."""
    module, _, part = factor.rpartition(".lora_")
    return f"{module}.bias" if part == "B.bias" else f"{module}.weight"


def _has_adapter(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names)


def _stand_in(shape: Any) -> Parameter:
    return _frozen(_NOTHING.expand(shape) if len(shape) else _NOTHING[0])


def _is_stand_in(parameter: Tensor) -> bool:
    return parameter.data_ptr() == _NOTHING.data_ptr()


def _frozen(value: Tensor) -> Parameter:
    return Parameter(value, requires_grad=False)

# SPDX-License-Identifier: Apache-2.0
"""Write LoHa and LoKr as the plain LoRA of the same update, which every loader and merge knows.

Both are products of small factors whose rank is known, so the plain pair is exact: columns of the
first factor with every column of the second. Where that rank is beyond the weight's own, the update
itself and the identity are the pair.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import RequestError

__all__ = ["FACTORS", "plain_lora"]

State = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
FACTORS = (*LOHA, *LOKR)
"""Last parts of the names of their tensors, those of convolutions (`hada_t1`, `lokr_t2`) aside."""


def plain_lora(state: Mapping[str, Tensor], where: str) -> State:
    """Return a LoRA's tensors with every LoHa and LoKr as a pair; others as they are.

    Args:
        state: Name → tensor of a file.
        where: The file, for messages.

    Raises:
        RequestError: a factor is missing, or doesn't fit another; names the module.
    """
    modules = {n.rpartition(".")[0] for n in state if n.rpartition(".")[2] in FACTORS}
    found = {n: t for n, t in state.items() if n.rpartition(".")[0] not in modules}
    for module in sorted(modules):
        own = {f: state[f"{module}.{f}"].float() for f in FACTORS if f"{module}.{f}" in state}
        place = f"{where}, module '{module}'"
        try:
            up, down = _loha(own) if LOHA[0] in own else _lokr(own)
        except (KeyError, RuntimeError) as error:
            fault = f"has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
            raise RequestError(
                place, f"can't be multiplied out: {fault}", "use a whole file"
            ) from error
        up = up * _scale(own, state.get(f"{module}.alpha"))
        rows, columns = up.shape[0], down.shape[1]
        if up.shape[1] > min(rows, columns):
            update = up @ down
            is_tall = columns < rows
            up, down = (update, torch.eye(columns)) if is_tall else (torch.eye(rows), update)
        if module.startswith("transformer."):
            found |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        else:
            found |= {
                f"{module}.lora_down.weight": down,
                f"{module}.lora_up.weight": up,
                f"{module}.alpha": torch.tensor(float(down.shape[0])),
            }
    return {n: t.contiguous() for n, t in found.items()}


def _loha(own: Mapping[str, Tensor]) -> Pair:
    """(A₁·B₁) ∘ (A₂·B₂): one column for each pair of columns of A₁ and A₂."""
    first, second = ((own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]) for i in (1, 2))
    up = torch.einsum("or,os->ors", first[0], second[0]).flatten(1)
    down = torch.einsum("ri,si->rsi", first[1], second[1]).flatten(0, 1)
    return up, down


def _lokr(own: Mapping[str, Tensor]) -> Pair:
    """W₁ ⊗ (A₂·B₂) = (W₁ ⊗ A₂)·(1 ⊗ B₂)."""
    first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        second, last = own["lokr_w2"], torch.eye(own["lokr_w2"].shape[1])
    else:
        second, last = own["lokr_w2_a"], own["lokr_w2_b"]
    return torch.kron(first, second), torch.kron(torch.eye(first.shape[1]), last)


def _scale(own: Mapping[str, Tensor], alpha: Tensor | None) -> float:
    """Return alpha over the rank of the factors; 1 where no factor has one, or no alpha is told."""
    ranked = next((own[f] for f in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if f in own), None)
    return 1.0 if alpha is None or ranked is None else float(alpha) / ranked.shape[0]

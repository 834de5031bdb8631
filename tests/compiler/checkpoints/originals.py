# SPDX-License-Identifier: Apache-2.0
"""State dicts of diffusers' classes as the models' authors name and fuse them.

Nothing here is trusted: every test hands the result to diffusers' own `from_single_file`, and holds
ours to what that makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def wan(state: State) -> State:
    renames = (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (".to_out.0.", ".o."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".add_k_proj.", ".k_img."),
        (".add_v_proj.", ".v_img."),
        (".norm_added_k.", ".norm_k_img."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        ("proj_out", "head.head"),
        (".scale_shift_table", ".modulation"),
        (".norm2.", ".norm3."),
    )
    renamed = {_renamed(n, renames): t for n, t in state.items()}
    renamed["head.modulation"] = renamed.pop("scale_shift_table")
    return renamed


def ltx(state: State) -> State:
    renames = (
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
        ("time_embed.", "adaln_single."),
    )
    renamed = {_renamed(n, renames): t for n, t in state.items()}
    for kind in ("weight", "bias"):
        renamed[f"patchify_proj.{kind}"] = renamed.pop(f"proj_in.{kind}")
    return renamed


def sd3(state: State) -> State:
    renames = (
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    )
    out = {
        _renamed(n, renames): t
        for n, t in state.items()
        if not n.startswith(("transformer_blocks.", "norm_out.", "proj_out."))
    }
    count = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("transformer_blocks."))
    names = (
        ("attn.to_out.0", "x_block.attn.proj"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("attn2.to_out.0", "x_block.attn2.proj"),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("attn.norm_q", "x_block.attn.ln_q"),
        ("attn.norm_k", "x_block.attn.ln_k"),
        ("attn.norm_added_q", "context_block.attn.ln_q"),
        ("attn.norm_added_k", "context_block.attn.ln_k"),
        ("attn2.norm_q", "x_block.attn2.ln_q"),
        ("attn2.norm_k", "x_block.attn2.ln_k"),
    )
    fused = (
        ("attn.to_{}", "x_block.attn.qkv"),
        ("attn.add_{}_proj", "context_block.attn.qkv"),
        ("attn2.to_{}", "x_block.attn2.qkv"),
    )
    for i in range(count):
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for kind in ("weight", "bias"):
            for new, old in names:
                if f"{ours}{new}.{kind}" in state:
                    out[f"{theirs}{old}.{kind}"] = state[f"{ours}{new}.{kind}"]
            for new, old in fused:
                parts = [f"{ours}{new.format(x)}.{kind}" for x in "qkv"]
                if parts[0] in state:
                    out[f"{theirs}{old}.{kind}"] = torch.cat([state[p] for p in parts])
            context = state[f"{ours}norm1_context.linear.{kind}"]
            last = i == count - 1
            out[f"{theirs}context_block.adaLN_modulation.1.{kind}"] = (
                swapped(context) if last else context
            )
    for kind in ("weight", "bias"):
        out[f"final_layer.linear.{kind}"] = state[f"proj_out.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    return out


def z_image(state: State) -> State:
    """Query, key and value in one, and a norm that the authors' model makes no use of."""
    renames = (
        ("all_final_layer.2-1", "final_layer"),
        ("all_x_embedder.2-1", "x_embedder"),
        ("attention.to_out.0", "attention.out"),
        ("attention.norm_q", "attention.q_norm"),
        ("attention.norm_k", "attention.k_norm"),
    )
    parts = [f"attention.to_{x}.weight" for x in "qkv"]
    out = {_renamed(n, renames): t for n, t in state.items() if not n.endswith(tuple(parts))}
    for name in state:
        if name.endswith(parts[0]):
            block = name.removesuffix(parts[0])
            fused = torch.cat([state[block + part] for part in parts])
            out[f"{block}attention.qkv.weight"] = fused
    out["norm_final.weight"] = torch.ones_like(state["x_pad_token"][0])
    return out


def flux(state: State) -> State:
    out: State = {}
    embedders = (
        ("time_text_embed.timestep_embedder", "time_in"),
        ("time_text_embed.text_embedder", "vector_in"),
        ("time_text_embed.guidance_embedder", "guidance_in"),
    )
    double = (
        ("norm1.linear", "img_mod.lin"),
        ("norm1_context.linear", "txt_mod.lin"),
        ("ff.net.0.proj", "img_mlp.0"),
        ("ff.net.2", "img_mlp.2"),
        ("ff_context.net.0.proj", "txt_mlp.0"),
        ("ff_context.net.2", "txt_mlp.2"),
        ("attn.to_out.0", "img_attn.proj"),
        ("attn.to_add_out", "txt_attn.proj"),
    )
    norms = (
        ("attn.norm_q", "img_attn.norm.query_norm"),
        ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm"),
    )
    doubles = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("transformer_blocks."))
    singles = 1 + max(
        int(n.split(".")[1]) for n in state if n.startswith("single_transformer_blocks.")
    )
    for kind in ("weight", "bias"):
        for ours, theirs in embedders:
            for index, layer in ((1, "in_layer"), (2, "out_layer")):
                name = f"{ours}.linear_{index}.{kind}"
                if name in state:
                    out[f"{theirs}.{layer}.{kind}"] = state[name]
        out[f"txt_in.{kind}"] = state[f"context_embedder.{kind}"]
        out[f"img_in.{kind}"] = state[f"x_embedder.{kind}"]
        out[f"final_layer.linear.{kind}"] = state[f"proj_out.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
        for i in range(doubles):
            ours, theirs = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            for new, old in double:
                out[f"{theirs}{old}.{kind}"] = state[f"{ours}{new}.{kind}"]
            for new, old in (("attn.to_{}", "img_attn"), ("attn.add_{}_proj", "txt_attn")):
                parts = [state[f"{ours}{new.format(x)}.{kind}"] for x in "qkv"]
                out[f"{theirs}{old}.qkv.{kind}"] = torch.cat(parts)
        for i in range(singles):
            ours, theirs = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
            out[f"{theirs}modulation.lin.{kind}"] = state[f"{ours}norm.linear.{kind}"]
            out[f"{theirs}linear2.{kind}"] = state[f"{ours}proj_out.{kind}"]
            parts = [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
            out[f"{theirs}linear1.{kind}"] = torch.cat([state[f"{ours}{p}.{kind}"] for p in parts])
    for i in range(doubles):
        for new, old in norms:
            out[f"double_blocks.{i}.{old}.scale"] = state[f"transformer_blocks.{i}.{new}.weight"]
    for i in range(singles):
        for new, old in (("q", "query"), ("k", "key")):
            name = f"single_transformer_blocks.{i}.attn.norm_{new}.weight"
            out[f"single_blocks.{i}.norm.{old}_norm.scale"] = state[name]
    return out


def hunyuan(state: State) -> State:
    renames = (
        ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
        ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
        ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
        ("context_embedder.proj_in", "txt_in.input_embedder"),
        ("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
        ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
        ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        ("x_embedder", "img_in"),
    )
    double = (
        ("norm1.linear", "img_mod.linear"),
        ("norm1_context.linear", "txt_mod.linear"),
        ("attn.norm_q", "img_attn_q_norm"),
        ("attn.norm_k", "img_attn_k_norm"),
        ("attn.norm_added_q", "txt_attn_q_norm"),
        ("attn.norm_added_k", "txt_attn_k_norm"),
        ("attn.to_out.0", "img_attn_proj"),
        ("attn.to_add_out", "txt_attn_proj"),
        ("ff.net.0.proj", "img_mlp.fc1"),
        ("ff.net.2", "img_mlp.fc2"),
        ("ff_context.net.0.proj", "txt_mlp.fc1"),
        ("ff_context.net.2", "txt_mlp.fc2"),
    )
    single = (
        ("norm.linear", "modulation.linear"),
        ("proj_out", "linear2"),
        ("attn.norm_q", "q_norm"),
        ("attn.norm_k", "k_norm"),
    )
    refiner = (
        ("attn.to_out.0", "self_attn_proj"),
        ("norm_out.linear", "adaLN_modulation.1"),
        ("ff.net.0.proj", "mlp.fc1"),
        ("ff.net.2", "mlp.fc2"),
    )
    out: State = {}
    for name, tensor in state.items():
        head, _, kind = name.rpartition(".")
        if name.startswith("transformer_blocks."):
            head = head.replace("transformer_blocks", "double_blocks")
            part, rows = "img_attn_qkv", [f"attn.to_{x}" for x in "qkv"]
            if ".add_" in head:
                part, rows = "txt_attn_qkv", [f"attn.add_{x}_proj" for x in "qkv"]
        elif name.startswith("single_transformer_blocks."):
            head = head.replace("single_transformer_blocks", "single_blocks")
            part, rows = "linear1", [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
        elif "refiner_blocks" in name:
            part, rows = "self_attn_qkv", [f"attn.to_{x}" for x in "qkv"]
        else:
            rows = []
        if any(head.endswith(r) for r in rows):
            if head.endswith(rows[0]):
                stems = [name.removesuffix(f"{rows[0]}.{kind}") + f"{r}.{kind}" for r in rows]
                fused = torch.cat([state[s] for s in stems])
                place = _renamed(head.removesuffix(rows[0]) + part, renames)
                out[f"{place}.{kind}"] = fused
            continue
        table = (
            double
            if head.startswith("double_blocks")
            else single
            if head.startswith("single_blocks")
            else refiner
            if "refiner_blocks" in head
            else ()
        )
        for new, old in table:
            if head.endswith(f".{new}"):
                head = head.removesuffix(new) + old
                break
        out[f"{_renamed(head, renames)}.{kind}"] = tensor
    for kind in ("weight", "bias"):
        out[f"final_layer.linear.{kind}"] = out.pop(f"proj_out.{kind}")
        place = f"final_layer.adaLN_modulation.1.{kind}"
        out[place] = swapped(out.pop(f"norm_out.linear.{kind}"))
    return out


def swapped(tensor: Tensor) -> Tensor:
    """Return scale and shift in the other order."""
    return torch.cat(list(reversed(tensor.chunk(2))))


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for new, old in renames:
        name = name.replace(new, old)
    return name

# SPDX-License-Identifier: Apache-2.0
"""The patches of image models' rows, each with the reason why it gives the same."""

from __future__ import annotations

from .patch import Patch

__all__ = [
    "BRIA_FIBO_2",
    "CHROMA",
    "ERNIE_IMAGE",
    "GLM_IMAGE",
    "HUNYUAN_IMAGE",
    "LUMINA_2",
    "LUMINA_NEXT",
    "NUCLEUS_IMAGE",
]

HUNYUAN_IMAGE = (
    Patch(
        "HunyuanImageTransformer2DModel.forward",
        first="# reorder and combine text tokens",
        until="attention_mask = torch.nn.functional.pad",
        digest="9f8cf415a7ba",
        lines="""
encoder_hidden_states = torch.cat([encoder_hidden_states_2, encoder_hidden_states], dim=1)
encoder_attention_mask = torch.cat([encoder_attention_mask_2, encoder_attention_mask], dim=1)
""",
    ),
)
"""Text tokens have no positions, so attention gives the same in any order of them: the real tokens
need not be sorted before the padding, of which the mask says what it is."""

LUMINA_2 = (
    Patch(
        "Lumina2RotaryPosEmbed._precompute_freqs_cis",
        first="freqs_dtype =",
        until="for i, (d, e)",
        digest="6e945c8b7dce",
        lines="freqs_dtype = torch.float32",
    ),
    Patch(
        "Lumina2RotaryPosEmbed._get_freqs_cis",
        first="freqs =",
        until="return torch.cat",
        digest="a8901ac9ed8f",
        lines="result.append(self.freqs_cis[i].to(ids.device)[ids[:, :, i].long()])",
    ),
    Patch(
        "Lumina2RotaryPosEmbed.forward",
        first="l_effective_cap_len =",
        until="# image patch embeddings",
        digest="6309a0115bf2",
        lines="""
counts = attention_mask.sum(dim=1)
positions = torch.arange(encoder_seq_len, device=device)
zeros = torch.zeros_like(positions)
text = torch.stack([positions, zeros, zeros], dim=-1)[None].expand(batch_size, -1, -1)
rows = torch.arange(post_patch_height, device=device)[:, None].expand(-1, post_patch_width)
columns = torch.arange(post_patch_width, device=device)[None].expand(post_patch_height, -1)
grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)[None]
behind = torch.stack([counts, torch.zeros_like(counts), torch.zeros_like(counts)], dim=-1)
freqs_cis = self._get_freqs_cis(torch.cat([text, grid + behind[:, None].to(grid.dtype)], dim=1))
cap_freqs_cis, img_freqs_cis = freqs_cis[:, :encoder_seq_len], freqs_cis[:, encoder_seq_len:]
l_effective_cap_len = seq_lengths = None
""",
    ),
    Patch(
        "Lumina2Transformer2DModel.forward",
        first="max_seq_len = max(seq_lengths)",
        until="for layer in self.layers:",
        digest="dc60a07a25db",
        lines="""
use_mask = True
attention_mask = torch.nn.functional.pad(
    encoder_attention_mask.bool(), (0, hidden_states.shape[1]), value=True
)
hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
""",
    ),
    Patch(
        "Lumina2Transformer2DModel.forward",
        first="output = []",
        until="if not return_dict:",
        digest="9ee879f6496f",
        lines="""
output = hidden_states[:, encoder_attention_mask.shape[1] :]
output = output.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, self.out_channels))
output = output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
""",
    ),
)
"""Text stays padded, and its padding masked, where diffusers takes it out of each batch element; the
image's position behind the text is the count of the real tokens, as there. Equal where real tokens
come first, as the pipeline's tokenizer has them. Angles are float32: no engine passes doubles on."""

BRIA_FIBO_2 = (
    Patch(
        "BriaFibo2Transformer2DModel.forward",
        first="# 4. Gist count",
        until="noise_mask = torch.zeros(",
        digest="69b7f064d75c",
        lines="""
config = self.config
fewest, most = config.min_num_gist_tokens, config.max_num_gist_tokens
span = config.gist_max_text_len - config.gist_min_text_len
lengths = encoder_attention_mask.sum(dim=1) - config.gist_min_text_len
raw = fewest * span + lengths.clamp(0, span) * (most - fewest)
counts = torch.ceil(raw / (span * config.gist_step)) * config.gist_step
gist_mask = torch.arange(most, device=device) < counts.clamp(fewest, most)[:, None]
gist = self.perceiver(encoder_hidden_states[:, 0], most, encoder_attention_mask, gist_mask)
gist_ids = self.create_coordinate_grid((most, 1, 1), (1, 0, 0), device).flatten(0, 2)
gist_freqs = self.rope_embedder(gist_ids).unsqueeze(0)
image_start = most
attention_mask = F.pad(gist_mask, (0, hidden_states.shape[1]), value=True)
hidden_states = torch.cat([gist, hidden_states], dim=1)
freqs_cis = torch.cat([gist_freqs, image_freqs], dim=1)
""",
    ),
)
"""All prompts have the most gist tokens, of which a mask tells those that the text's length asks for: as
diffusers does it with prompts of several lengths in a batch. Positions tell tokens apart, so their
order changes nothing."""

CHROMA = (
    Patch(
        "ChromaCombinedTimestepTextProjEmbeddings.forward",
        first="guidance_proj =",
        until="mod_proj =",
        digest="c0efa1dd051f",
        lines="guidance_proj = self.guidance_proj(torch.zeros_like(timestep))",
    ),
)
"""As many zeros as there are timesteps: a list of Python's has a length that is no symbolic size."""

ERNIE_IMAGE = (
    Patch(
        "ErnieImageTransformer2DModel.forward",
        first="img_sbh =",
        until="# text_bth, text_lens",
        digest="1dfd3dd26194",
        lines="hidden_states = self.x_embedder(hidden_states)",
    ),
    Patch(
        "ErnieImageTransformer2DModel.forward",
        first="text_sbh =",
        until="# Position IDs",
        digest="e6c302d79ecd",
        lines="x = torch.cat([hidden_states, text_bth], dim=1)",
    ),
    Patch(
        "ErnieImageTransformer2DModel.forward",
        first="shift_msa, scale_msa",
        until="for layer in",
        digest="3e077c9239e1",
        lines="""
shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
    self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
)
c = c.unsqueeze(1)
""",
    ),
    Patch(
        "ErnieImageTransformer2DModel.forward",
        first="patches =",
        until="output = (",
        digest="0e57a8fb0170",
        lines="patches = self.final_linear(x)[:, :N_img]",
    ),
    Patch(
        "ErnieImageSharedAdaLNBlock.forward",
        first="x_bsh =",
        until="x = residual",
        digest="2c6e43189c62",
        lines="""
attn_out = self.self_attention(x, attention_mask=attention_mask, image_rotary_emb=rotary_pos_emb)
""",
    ),
    Patch(
        "ErnieImageAdaLNContinuous.forward",
        first="x = x *",
        until="return x",
        digest="ea11302aa42a",
        lines="x = x * (1 + scale) + shift",
    ),
)
"""The batch stays in front of the tokens, where diffusers' blocks have it behind them."""

GLM_IMAGE = (
    Patch(
        "GlmImageTransformer2DModel.forward",
        first="prior_embedding[prior_token_drop] *=",
        until="prior_hidden_states =",
        digest="b0241003acd8",
        lines="prior_embedding = prior_embedding.masked_fill(prior_token_drop.unsqueeze(-1), 0.0)",
    ),
)
"""Embeddings that are dropped become zeros where they stand: a list of them has no known length."""

LUMINA_NEXT = (
    Patch(
        "LuminaAttnProcessor2_0.__call__",
        first="if base_sequence_length is not None:",
        until="else:",
        digest="e860e7eb7d93",
        lines="""
if base_sequence_length is not None:
    length = torch.full((1,), sequence_length, dtype=torch.float32, device=query.device)
    query = query * (length.log() / math.log(base_sequence_length)).sqrt()
    softmax_scale = attn.scale
""",
    ),
)
"""A logarithm of a number of tokens is computed of a tensor; queries are scaled by it, as attention would."""

NUCLEUS_IMAGE = (
    Patch(
        "SwiGLUExperts.forward",
        first="if self.use_grouped_mm:",
        until="return self._run_experts_for_loop",
        digest="10e46624a0aa",
        lines="""
x_per_expert = x.unflatten(0, (self.num_experts, -1))
gate, up = torch.matmul(x_per_expert, self.gate_up_proj).chunk(2, dim=-1)
return torch.matmul(F.silu(gate) * up, self.down_proj).flatten(0, 1)
""",
    ),
    Patch(
        "NucleusMoELayer.forward",
        first="token_score_sums =",
        until="gating_flat = gating_flat / (",
        digest="bd9b52091f92",
        lines="""
token_score_sums = torch.zeros_like(hidden_states[..., 0]).flatten()
token_score_sums = token_score_sums.index_put((global_token_indices,), gating_flat, accumulate=True)
""",
    ),
    Patch(
        "NucleusMoELayer.forward",
        first="scatter_idx =",
        until="out = out.reshape(bs, slen, dim)",
        digest="bd2ae2b58bbb",
        lines="out = out.index_put((global_token_indices,), routed_output, accumulate=True)",
    ),
)
"""Experts choose their tokens, each as many: one product of all experts gives what a loop over them does.
What they give is added row by row, where diffusers adds number by number."""

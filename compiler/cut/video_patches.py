# SPDX-License-Identifier: Apache-2.0
"""The patches of video models' rows, each with the reason why it gives the same."""

from __future__ import annotations

from .patch import Patch

__all__ = [
    "ANY_FLOW",
    "CHRONO_EDIT",
    "CONSIS_ID",
    "COSMOS",
    "EASY_ANIMATE",
    "HUNYUAN_VIDEO_15",
    "KANDINSKY_5",
    "LATTE",
    "MINIMAX_H3",
    "MOCHI",
    "WAN_ANIMATE",
]

HUNYUAN_VIDEO_15 = (
    Patch(
        "HunyuanVideo15Transformer3DModel.forward",
        first="encoder_hidden_states_cond_emb = self.cond_type_embed(",
        until="encoder_hidden_states = encoder_hidden_states + encoder_hidden_states_cond_emb",
        digest="ada51609387f",
        lines="encoder_hidden_states_cond_emb = self.cond_type_embed.weight[0]",
    ),
    Patch(
        "HunyuanVideo15Transformer3DModel.forward",
        first="encoder_hidden_states_2_cond_emb = self.cond_type_embed(",
        until="encoder_hidden_states_2 = encoder_hidden_states_2 + encoder_hidden_states_2_cond_emb",
        digest="9fdb111094b9",
        lines="encoder_hidden_states_2_cond_emb = self.cond_type_embed.weight[1]",
    ),
    Patch(
        "HunyuanVideo15Transformer3DModel.forward",
        first="if is_t2v:",
        until="encoder_hidden_states_3 = encoder_hidden_states_3 + encoder_hidden_states_3_cond_emb",
        digest="0bb32f59827f",
        lines="""
encoder_attention_mask_3 = (~is_t2v).expand(batch_size, encoder_hidden_states_3.shape[1])
encoder_hidden_states_3_cond_emb = self.cond_type_embed.weight[2]
""",
    ),
    Patch(
        "HunyuanVideo15Transformer3DModel.forward",
        first="new_encoder_hidden_states = []",
        until="# 4. Transformer blocks",
        digest="d32fcbae1132",
        lines="""
encoder_hidden_states = torch.cat(
    [encoder_hidden_states_3, encoder_hidden_states_2, encoder_hidden_states], dim=1
)
encoder_attention_mask = torch.cat(
    [encoder_attention_mask_3, encoder_attention_mask_2, encoder_attention_mask], dim=1
)
""",
    ),
    Patch(
        "HunyuanVideo15AttnProcessor2_0.__call__",
        first="self_attn_mask_1 =",
        until="# 5. Attention",
        digest="ae8c881b8665",
        lines="attention_mask = attention_mask.view(batch_size, 1, 1, seq_len)",
    ),
)
"""As in `HUNYUAN_IMAGE`, tokens stay in their order; an image of zeros, which means none, is masked by
a value rather than left out by a branch. A padding token's own row of attention is read by nobody,
so a mask of keys alone does, where diffusers makes one of all pairs of tokens. Kinds of tokens are
rows of a table, whatever the text's length."""

MOCHI = (
    Patch(
        "MochiAttnProcessor2_0.__call__",
        first="attn_outputs = []",
        until="hidden_states = hidden_states.transpose(1, 2).flatten(2, 3)",
        digest="5d290aa6cf0e",
        lines="""
mask = F.pad(attention_mask.bool(), (sequence_length, 0), value=True)
hidden_states = F.scaled_dot_product_attention(
    torch.cat([query, encoder_query], dim=2),
    torch.cat([key, encoder_key], dim=2),
    torch.cat([value, encoder_value], dim=2),
    attn_mask=mask[:, None, None],
)
""",
    ),
    Patch(
        "MochiRoPE._get_positions",
        first="scale =",
        until="t = torch.arange",
        digest="64620d11e5c0",
        lines="""
area = torch.scalar_tensor(height * width, dtype=torch.float32)
scale = (self.target_area / area) ** 0.5
""",
    ),
)
"""Padding of the text is masked, where diffusers takes it out of each batch element; what it computes
for padding itself is read by nobody. Equal where real tokens come first, as Mochi's tokenizer has
them: diffusers itself moves others to the front. The root of a size is a tensor's, not Python's."""

CONSIS_ID = (
    Patch(
        "PerceiverCrossAttention.forward",
        first="image_embeds = self.norm1",
        until="hidden_states = self.norm2",
        digest="ae04e49c325e",
        lines="""
(image_embeds, face_scale), stream = image_embeds, hidden_states
image_embeds = self.norm1(image_embeds)
""",
    ),
    Patch(
        "PerceiverCrossAttention.forward",
        first="out = out.permute",
        until="return self.to_out",
        digest="9c98df93f015",
        lines="""
out = out.permute(0, 2, 1, 3).reshape(batch_size, seq_len, -1)
return stream + face_scale * self.to_out(out)
""",
    ),
    Patch(
        "ConsisIDTransformer3DModel.forward",
        first="hidden_states = hidden_states + self.local_face_scale",
        until="ca_idx += 1",
        digest="5f02180ec179",
        lines="""
face = (valid_face_emb, self.local_face_scale)
hidden_states = self.perceiver_cross_attention[ca_idx](face, hidden_states)
""",
    ),
)
"""What attention to the face adds to the stream is added inside its block, not behind it: then a block
hands the stream on, as all others do."""

ANY_FLOW = (
    Patch(
        "AnyFlowDualTimestepTextImageEmbedding.forward_timestep",
        first="timestep = timestep.reshape",
        until="timestep = self.timesteps_proj",
        digest="fb17b9a182c1",
        lines="timestep, delta_timestep = timestep[:, 0], delta_timestep[:, 0]",
    ),
    Patch(
        "AnyFlowDualTimestepTextImageEmbedding.forward_timestep",
        first="rt_emb = rt_emb.unflatten",
        until="return rt_emb",
        digest="e916fa9bc6f0",
        lines="rt_emb, timestep_proj = rt_emb.unsqueeze(1), timestep_proj.unsqueeze(1)",
    ),
)
"""All frames have the step's timesteps, so that one embedding serves all of their tokens."""

MINIMAX_H3 = (
    Patch(
        "MiniMaxH3Transformer3DModel.forward",
        first="rotary_emb = self.rope(",
        until="# 1. Project each",
        digest="884eefdf6a9b",
        lines="""
torch._check(text_indices.shape[0] == encoder_hidden_states.shape[1])
torch._check(video_indices.shape[0] == hidden_states.shape[1])
torch._check(audio_indices.shape[0] == audio_hidden_states.shape[1])
order = torch.cat([text_indices, video_indices, audio_indices])
rotary_emb = self.rope(position_ids[order])
timestep_indices, token_tags = timestep_indices[order], token_tags[order]
""",
    ),
    Patch(
        "MiniMaxH3Transformer3DModel.forward",
        first="hidden_states = text_embeds.new_zeros",
        until="# 2. One timestep",
        digest="9362fbea0cbf",
        lines="hidden_states = torch.cat([text_embeds, video_embeds, audio_embeds], dim=1)",
    ),
    Patch(
        "MiniMaxH3Transformer3DModel.forward",
        first="hidden_states = self.norm_out(",
        until="if not return_dict",
        digest="d21ec3ff431c",
        lines="""
video = text_embeds.shape[1]
audio = video + video_embeds.shape[1]
video_output, audio_output = (
    head(self.norm_out(hidden_states[:, rows], temb, timestep_indices[rows]))
    for head, rows in (
        (self.proj_out, slice(video, audio)), (self.audio_proj_out, slice(audio, None))
    )
)
""",
    ),
)
"""A row of the sequence has its position, kind and timestep beside it, so the rows may stand in any
order: what each of text, video and sound is made of stays together, and each head sees its own."""

CHRONO_EDIT = (
    Patch(
        "ChronoEditRotaryPosEmbed.forward",
        first="if num_frames == 2",
        until="freqs_cos_h",
        digest="13963d07a659",
        lines="""
torch._check(ppf <= freqs_cos[0].shape[0])
is_pair = torch.scalar_tensor(num_frames) == 2
positions = torch.arange(ppf) * torch.where(is_pair, self.temporal_skip_len - 1, 1)
freqs_cos_f = freqs_cos[0][positions].view(ppf, 1, 1, -1).expand(ppf, pph, ppw, -1)
""",
    ),
    Patch(
        "ChronoEditRotaryPosEmbed.forward",
        first="if num_frames == 2",
        until="freqs_sin_h",
        digest="62408090c9ba",
        lines="freqs_sin_f = freqs_sin[0][positions].view(ppf, 1, 1, -1).expand(ppf, pph, ppw, -1)",
    ),
)
"""Two frames are the ends of a clip of `temporal_skip_len`, and lie that far apart; where there are
other frames too, each follows the one before it. The number of frames chooses by a value, not a branch."""

EASY_ANIMATE = (
    Patch(
        "EasyAnimateRotaryPosEmbed.get_resize_crop_region_for_grid",
        first="r = h / w",
        until="return (crop_top",
        digest="6c8431029aed",
        lines="""
h = torch.scalar_tensor(h, dtype=torch.float32)
w = torch.scalar_tensor(w, dtype=torch.float32)
is_tall = h * tw > w * th
resize_height = torch.where(is_tall, th, torch.round(tw * h / w))
resize_width = torch.where(is_tall, torch.round(th * w / h), tw)
crop_top = torch.round((th - resize_height) / 2)
crop_left = torch.round((tw - resize_width) / 2)
""",
    ),
)
"""The grid's crop is a tensor of the latents' size, not a branch of Python's. Its sizes are divided last:
Python's quotient of 9 in 40,000 grids (up to 200 by 200) is rounded otherwise, by one."""

COSMOS = (
    Patch(
        "CosmosLearnablePositionalEmbed.forward",
        first="norm = torch.add(",
        until="return (emb / norm)",
        digest="f25bd21c079a",
        lines="norm = torch.add(self.eps, norm, alpha=emb.shape[-1] ** -0.5)",
    ),
    Patch(
        "CosmosTransformer3DModel.forward",
        first="padding_mask_resized = transforms",
        until="hidden_states = torch.cat(",
        digest="f54ca60716fc",
        lines="""
padding_mask_resized = padding_mask.unflatten(3, (width, -1))[..., 0]
padding_mask_resized = padding_mask_resized.unflatten(2, (height, -1))[:, :, :, 0]
""",
    ),
)
"""A norm has one number a token, so that the ratio of the two counts is the width's. The padding mask's
pixels are a multiple of the latents' sizes: the nearest is the first of each."""

LATTE = (
    Patch(
        "LatteTransformer3DModel.forward",
        first="# Prepare text embeddings for spatial block",
        until="shift, scale = (self.scale_shift_table",
        digest="f77acb51e583",
        lines="""
encoder_hidden_states = self.caption_projection(encoder_hidden_states)
hidden_states = hidden_states.unflatten(0, (batch_size, num_frame)).flatten(1, 2)
blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks)
for i, (spatial_block, temp_block) in enumerate(blocks):
    hidden_states = spatial_block(
        hidden_states, None, encoder_hidden_states, None, timestep, {"frames": num_frame}
    )
    if i == 0 and num_frame > 1:
        hidden_states = hidden_states.unflatten(1, (num_frame, -1))
        hidden_states = (hidden_states + self.temp_pos_embed.unsqueeze(2)).flatten(1, 2)
    hidden_states = temp_block(hidden_states, None, None, None, timestep, {"frames": num_frame})
""",
    ),
    Patch(
        "BasicTransformerBlock.forward",
        first="# 1. Prepare GLIGEN inputs",
        until='if self.norm_type == "ada_norm_zero":',
        digest="a6fed280c98a",
        lines="""
cross_attention_kwargs, gligen_kwargs = {}, None
together = norm_hidden_states.unflatten(1, (frames, -1))
if self.attn2 is None:
    together = together.transpose(1, 2)
attn_output = self.attn1(together.flatten(0, 1)).unflatten(0, together.shape[:2])
if self.attn2 is None:
    attn_output = attn_output.transpose(1, 2)
attn_output = attn_output.flatten(1, 2)
""",
    ),
    Patch(
        "BasicTransformerBlock.forward",
        first="if cross_attention_kwargs is not None:",
        until="# Notice that normalization",
        digest="a720552921af",
        lines='frames = cross_attention_kwargs["frames"]',
    ),
)
"""All tokens stay in one sequence from block to block, and self-attention alone takes them apart, by
frames or by places, where diffusers lays the stream out anew before each block. A text is attended to by
the tokens of all frames at once."""

KANDINSKY_5 = (
    Patch(
        "Kandinsky5AttnProcessor.__call__",
        first="return x_out.reshape(*x.shape).to(torch.bfloat16)",
        until="if rotary_emb is not None:",
        digest="38b6f0fa79c9",
        lines="return x_out.reshape(*x.shape)",
        rounds=True,
    ),
)
"""Rotated queries and keys are rounded to bfloat16 in a model of any precision. A bundle's precision is
chosen when it is built, and in float32 the last bit of a sum would decide how one is rounded."""

WAN_ANIMATE = (
    Patch(
        "WanAnimateTransformer3DModel.forward",
        first="hidden_states[:, :, 1:] =",
        until="# Calling contiguous",
        digest="bf74ddac055f",
        lines="hidden_states = hidden_states + F.pad(pose_hidden_states, (0, 0, 0, 0, 1, 0))",
    ),
    Patch(
        "WanAnimateTransformer3DModel.forward",
        first="face_batches =",
        until="motion_vec = motion_vec.view",
        digest="4fd6ebf1aec5",
        lines="motion_vec = self.motion_encoder(face_pixel_values)",
    ),
    Patch(
        "WanAnimateTransformer3DModel.forward",
        first="pad_face =",
        until="# 5. Transformer blocks",
        digest="1dcf31177376",
        lines="""
motion_vec = F.pad(motion_vec, (0, 0, 0, 0, 1, 0))
motion_vec = motion_vec.reshape(batch_size, post_patch_num_frames, *motion_vec.shape[2:])
""",
    ),
    Patch(
        "WanAnimateTransformer3DModel.forward",
        first="face_adapter_output =",
        until="# 6. Output norm",
        digest="edbda637100e",
        lines="hidden_states = self.face_adapter[face_adapter_block_idx](hidden_states, motion_vec)",
    ),
    Patch(
        "WanAnimateMotionEncoder.forward",
        first="Q = torch.linalg.qr",
        until="motion_vec = motion_vec.to",
        digest="d7868671dfef",
        lines="""
left, mirrors = weight, []
for k in range(weight.shape[1]):
    first, below = left[k : k + 1, k : k + 1], left[k + 1 :, k : k + 1]
    length = (first.square() + below.square().sum()).sqrt()
    mirror = torch.cat([first + torch.where(first < 0, -length, length), below])
    mirror = F.pad(mirror / mirror.square().sum().sqrt(), (0, 0, k, 0))
    left = left - 2 * mirror @ (mirror.T @ left)
    mirrors.append(mirror)
Q = torch.eye(*weight.shape)
for mirror in reversed(mirrors):
    Q = Q - 2 * mirror @ (mirror.T @ Q)
motion_vec = motion_feat @ Q.T
""",
    ),
    Patch(
        "WanAnimateFaceBlockAttnProcessor.__call__",
        first="hidden_states = attn.pre_norm_q",
        until="encoder_hidden_states = attn.pre_norm_kv",
        digest="e077792e3cc1",
        lines="stream, hidden_states = hidden_states, attn.pre_norm_q(hidden_states)",
    ),
    Patch(
        "WanAnimateFaceBlockAttnProcessor.__call__",
        first="hidden_states = attn.to_out",
        until="if attention_mask is not None:",
        digest="9acadcf0dcc9",
        lines="hidden_states = stream + attn.to_out(hidden_states)",
    ),
)
"""The first frame has no pose. All faces go through the encoder at once: portions of them save memory
alone. What a face adds to the stream is added inside its block, as in `CONSIS_ID`. ONNX has no QR
decomposition: mirrors make one, with the signs that LAPACK gives."""

# SPDX-License-Identifier: Apache-2.0
"""Build the untrained parts of the model, each of the class that a large Wan checkpoint uses."""

from clips import all_captions
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 16
TEXT_CHANNELS = 128
TEXT_TOKENS = 16
"""Padded prompt length in training; the longest prompt has 10 tokens. Pass it as
``max_sequence_length`` to the pipeline, whose own default is 512."""
FLOW_SHIFT = 3.0


def make_vae() -> AutoencoderKLWan:
    """Build the video autoencoder: 8× smaller in space, 4× in time, 1.9 M parameters."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )


def make_transformer() -> WanTransformer3DModel:
    """Build the diffusion transformer: 8 blocks, 256 wide, 9.1 M parameters."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=8,
        ffn_dim=1024,
        text_dim=TEXT_CHANNELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        freq_dim=256,
        patch_size=(1, 2, 2),
    )


def make_text_encoder() -> UMT5EncoderModel:
    """Build the text encoder: 2 layers, 128 wide, trained together with the transformer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=128,
            d_model=TEXT_CHANNELS,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word of the captions."""
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def make_scheduler() -> UniPCMultistepScheduler:
    """Build the sampler that the pipeline uses by default."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )

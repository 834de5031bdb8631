// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The ends of a pipeline, where a bundle carries them: token ids → text states, latents → frames.

#include <cstdint>
#include <string>
#include <vector>

#include "freewheel/model.h"

namespace freewheel {

/// Whether the bundle was built with its text encoder.
bool can_encode(const Manifest& manifest) noexcept;

/// Whether the bundle takes prompts as text.
bool can_tokenize(const Manifest& manifest) noexcept;

/// Whether the bundle was built with its VAE decoder.
bool can_decode(const Manifest& manifest) noexcept;

/// The per-prompt input that token ids become.
std::string text_input(const Manifest& manifest);

/// Whether a per-prompt input is text, which branches do not share.
bool is_text(const std::string& input) noexcept;

/// Checks a prompt before anything is computed: its length, and that the encoder knows every id.
Status check_token_ids(const Manifest& manifest, const std::vector<std::int64_t>& ids,
                       std::int64_t text_tokens);

/// Checks that the decoder takes latents of this shape, before they are computed.
Status check_decodes(const Manifest& manifest, const Shape& latents);

/// The shape of what `encode_tokens` returns.
Result<Shape> text_shape(const Manifest& manifest, std::int64_t text_tokens);

/// The shape of what `decode_latents` returns; fails as `check_decodes` does.
Result<Shape> frames_shape(const Manifest& manifest, const Shape& latents);

/// Encodes a prompt.
/// @param ids Token ids of the pipeline's tokenizer, its end token included.
/// @param text_tokens Length to pad to; ids beyond it are refused.
/// @return Host float32 [1, text_tokens, width], zero behind the prompt.
Result<Buffer> encode_tokens(Model& model, const std::vector<std::int64_t>& ids,
                             std::int64_t text_tokens);

/// Decodes host float32 latents [1, channels, frames, height, width].
/// @return Host uint8 [1, frames, height, width, 3], RGB.
Result<Buffer> decode_latents(Model& model, const Tensor& latents);

}  // namespace freewheel

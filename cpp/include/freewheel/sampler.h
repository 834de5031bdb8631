// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Samplers as tables of factors, guidance, and the noise a run starts from.

#include <cstdint>

#include "freewheel/bundle.h"

namespace freewheel {

/// Computes the next sample as bundle.md says: summed in float64, rounded once.
/// @param samples,outputs Newest first, min(window, step_index + 1) of each.
/// @param next May be one of `samples`.
void advance(const SamplerTable& table, std::int64_t step_index, const float* const* samples,
             const float* const* outputs, float* next, std::int64_t count) noexcept;

/// guided = uncond + scale · (cond − uncond), in float32.
void guide(const float* cond, const float* uncond, float scale, float* guided,
           std::int64_t count) noexcept;

/// Fills with standard normal noise: what PyTorch's CPU generator draws for this seed, up to the
/// rounding of its vectorised logarithm (1e-6), where `count` is at least 16.
void gaussian_noise(std::uint64_t seed, float* out, std::int64_t count);

}  // namespace freewheel

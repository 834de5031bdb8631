// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Samplers as tables of factors, guidance, and the noise a run starts from.

#include <cstdint>
#include <random>

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

/// Standard normal noise of one seed, tensor after tensor: what PyTorch's CPU generator draws, up
/// to the rounding of its vectorised logarithm (1e-6), where each tensor has at least 16 values.
class Noise {
 public:
  explicit Noise(std::uint64_t seed) : generator_(static_cast<std::uint32_t>(seed)) {}
  void fill(float* out, std::int64_t count);

 private:
  std::mt19937 generator_;
};

/// Fills with the first values of a seed's noise.
void gaussian_noise(std::uint64_t seed, float* out, std::int64_t count);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace freewheel {
namespace {

constexpr std::int64_t kChunk = 512;
constexpr std::int64_t kPairs = 8;
constexpr std::int64_t kNoiseBlock = 2 * kPairs;

/// Adds factor · values to a chunk of sums.
void accumulate(double factor, const float* values, double* sums, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) sums[i] += factor * static_cast<double>(values[i]);
}

/// Turns 16 uniform numbers in [0, 1) into normal ones (Box and Muller).
void normal_from_uniform(float* values) noexcept {
  constexpr float kTwoPi = 6.283185307179586f;
  for (std::int64_t i = 0; i < kPairs; ++i) {
    const float radius = std::sqrt(-2.0f * std::log(1.0f - values[i]));
    const float angle = kTwoPi * values[i + kPairs];
    values[i] = radius * std::cos(angle);
    values[i + kPairs] = radius * std::sin(angle);
  }
}

}  // namespace

void advance(const SamplerTable& table, std::int64_t step_index, const float* const* samples,
             const float* const* outputs, float* next, std::int64_t count) noexcept {
  const double* row = table.row(step_index);
  const std::int64_t reach = std::min(table.window, step_index + 1);
  std::array<double, kChunk> sums;
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t size = std::min(kChunk, count - begin);
    std::fill_n(sums.begin(), size, 0.0);
    for (std::int64_t age = 0; age < reach; ++age) {
      accumulate(row[age], samples[age] + begin, sums.data(), size);
      accumulate(row[table.window + age], outputs[age] + begin, sums.data(), size);
    }
    for (std::int64_t i = 0; i < size; ++i) {
      next[begin + i] = static_cast<float>(sums[static_cast<std::size_t>(i)]);
    }
  }
}

void guide(const float* cond, const float* uncond, float scale, float* guided,
           std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    const float difference = cond[i] - uncond[i];
    const float scaled = scale * difference;
    guided[i] = uncond[i] + scaled;
  }
}

void gaussian_noise(std::uint64_t seed, float* out, std::int64_t count) {
  Noise(seed).fill(out, count);
}

void Noise::fill(float* out, std::int64_t count) {
  const auto uniform = [this] {
    return static_cast<float>(generator_() & 0xffffffu) / 16777216.0f;
  };
  if (count < kNoiseBlock) {
    std::array<float, kNoiseBlock> block;
    std::generate(block.begin(), block.end(), uniform);
    normal_from_uniform(block.data());
    std::copy_n(block.begin(), count, out);
    return;
  }
  std::generate_n(out, count, uniform);
  for (std::int64_t i = 0; i + kNoiseBlock <= count; i += kNoiseBlock) normal_from_uniform(out + i);
  if (count % kNoiseBlock != 0) {  // the last block is drawn anew, overlapping the one before
    float* last = out + count - kNoiseBlock;
    std::generate_n(last, kNoiseBlock, uniform);
    normal_from_uniform(last);
  }
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace freewheel {
namespace {

TEST(Advance, SumsSamplesAndOutputsNewestFirst) {
  SamplerTable table;
  table.window = 2;
  table.timesteps = table.sigmas = {1, 0.5};
  table.rows = {1, 0, -0.5, 0, 1, 0.25, -1, 2};
  std::vector<float> older = {1, 2}, newer = {3, 4}, older_out = {5, 6}, newer_out = {7, 8};
  const float* samples[] = {older.data(), nullptr};
  const float* outputs[] = {older_out.data(), nullptr};
  std::vector<float> next(2);
  advance(table, 0, samples, outputs, next.data(), 2);
  EXPECT_EQ(next, (std::vector<float>{-1.5f, -1.0f}));
  const float* both[] = {newer.data(), older.data()};
  const float* both_outputs[] = {newer_out.data(), older_out.data()};
  advance(table, 1, both, both_outputs, older.data(), 2);  // in place of the oldest
  EXPECT_EQ(older, (std::vector<float>{3 + 0.25f - 7 + 10, 4 + 0.5f - 8 + 12}));
}

TEST(Guide, IsLinearInItsBranches) {
  const float cond[] = {2, 4}, uncond[] = {1, 2};
  float guided[2];
  guide(cond, uncond, 3.0f, guided, 2);
  EXPECT_EQ(guided[0], 4.0f);
  EXPECT_EQ(guided[1], 8.0f);
}

TEST(Noise, IsWhatPyTorchDraws) {
  // torch.randn(20, generator=torch.Generator().manual_seed(42)): first, last block and tail.
  std::vector<float> noise(20);
  gaussian_noise(42, noise.data(), 20);
  EXPECT_NEAR(noise[0], 1.92691529f, 1e-5f);
  EXPECT_NEAR(noise[3], -2.10552096f, 1e-5f);
  std::vector<float> again(20);
  gaussian_noise(42, again.data(), 20);
  EXPECT_EQ(noise, again);
}

TEST(Noise, HasTheMomentsOfANormalDistribution) {
  std::vector<float> noise(100003);
  gaussian_noise(1, noise.data(), static_cast<std::int64_t>(noise.size()));
  const double mean =
      std::accumulate(noise.begin(), noise.end(), 0.0) / static_cast<double>(noise.size());
  double square = 0;
  for (float value : noise) square += static_cast<double>(value) * value;
  EXPECT_NEAR(mean, 0.0, 0.02);
  EXPECT_NEAR(square / static_cast<double>(noise.size()), 1.0, 0.02);
  gaussian_noise(1, noise.data(), 5);  // fewer than a block
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(std::isfinite(noise[static_cast<std::size_t>(i)]));
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace freewheel {
namespace {

TEST(Half, EveryValueSurvivesARoundTrip) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = float_from_half(half);
    if (std::isnan(value)) continue;
    ASSERT_EQ(half_from_float(value), half) << bits;
  }
}

TEST(Half, RoundsToNearestEvenAndSaturates) {
  EXPECT_EQ(half_from_float(1.0f + 0x1p-11f), 0x3c00);             // tie, even stays
  EXPECT_EQ(half_from_float(1.0f + 0x1p-11f + 0x1p-20f), 0x3c01);  // above the tie
  EXPECT_EQ(half_from_float(1.0f + 0x3p-11f), 0x3c02);             // tie, odd goes up
  EXPECT_EQ(half_from_float(65519.0f), 0x7bff);
  EXPECT_EQ(half_from_float(65520.0f), 0x7c00);
  EXPECT_EQ(half_from_float(-1e9f), 0xfc00);
  EXPECT_EQ(half_from_float(0x1p-25f), 0);
  EXPECT_EQ(half_from_float(0x1.8p-25f), 1);
  EXPECT_TRUE(std::isnan(float_from_half(half_from_float(NAN))));
}

TEST(Bfloat16, EveryValueSurvivesARoundTrip) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto value = float_from_bfloat16(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(bfloat16_from_float(value), bits);
  }
  EXPECT_TRUE(std::isnan(float_from_bfloat16(bfloat16_from_float(NAN))));
}

TEST(Shape, CountsAndSpells) {
  EXPECT_EQ((Shape{2, 3, 4}).elements(), 24);
  EXPECT_EQ(Shape{}.elements(), 1);
  EXPECT_EQ((Shape{1, 16}).text(), "[1, 16]");
  EXPECT_NE((Shape{1, 2}), (Shape{1, 2, 1}));
}

TEST(Buffer, IsZeroedAlignedAndMovable) {
  auto made = Buffer::create(host_memory(), DType::kFloat32, Shape{5});
  ASSERT_TRUE(made.ok());
  Buffer buffer = std::move(made).value();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.view().data) % 64, 0u);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(buffer.view().as<float>()[i], 0.0f);
  const void* data = buffer.view().data;
  const Buffer moved = std::move(buffer);
  EXPECT_EQ(moved.view().data, data);
}

TEST(Convert, GoesBetweenFloatDtypes) {
  float source[] = {1.5f, -2.0f};
  std::uint16_t halves[2];
  const Tensor from{source, DType::kFloat32, Shape{2}}, to{halves, DType::kFloat16, Shape{2}};
  ASSERT_TRUE(convert(from, to).ok());
  EXPECT_EQ(halves[0], 0x3e00);
  std::int64_t integers[2];
  const Status status = convert(from, {integers, DType::kInt64, Shape{2}});
  EXPECT_EQ(status.code(), Code::kRequest) << "1.5 is no whole number";
}

TEST(Convert, TakesWholeNumbersForIndicesAndMasks) {
  float source[] = {0.0f, 1.0f, 16777216.0f};
  std::int64_t indices[3];
  std::uint8_t flags[3];
  const Tensor from{source, DType::kFloat32, Shape{3}};
  ASSERT_TRUE(convert(from, {indices, DType::kInt64, Shape{3}}).ok());
  EXPECT_EQ(indices[2], 16777216);
  EXPECT_FALSE(convert(from, {flags, DType::kBool, Shape{3}}).ok());
  source[2] = 1.0f;
  ASSERT_TRUE(convert(from, {flags, DType::kBool, Shape{3}}).ok());
  EXPECT_EQ(flags[0] + 2 * flags[1] + 4 * flags[2], 6);
  for (const float bad : {-0.5f, 3e7f, std::nanf("")}) {
    source[0] = bad;
    EXPECT_FALSE(convert(from, {indices, DType::kInt64, Shape{3}}).ok()) << bad;
  }
}

TEST(Tensor, OneValueThatIsNotFiniteIsSeenInEveryDType) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBfloat16}) {
    for (float bad : {1.0f, kInfinity, -kInfinity, std::nanf("")}) {
      std::vector<float> values(37, 65000.0f);
      values[36] = bad;
      const Tensor source{values.data(), DType::kFloat32, Shape{37}};
      auto buffer = Buffer::create(host_memory(), dtype, Shape{37});
      ASSERT_TRUE(buffer.ok());
      ASSERT_TRUE(convert(source, buffer->view()).ok());
      EXPECT_EQ(is_finite(buffer->view()), bad == 1.0f) << dtype_name(dtype) << " " << bad;
    }
  }
  std::int64_t whole = -1;
  EXPECT_TRUE(is_finite({&whole, DType::kInt64, Shape{1}}));
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

namespace freewheel {
namespace {

Result<ResidualRing> ring_of(const std::map<std::string, Shape>& residuals) {
  return ResidualRing::create(host_memory(), 3, DType::kFloat32, residuals);
}

TEST(RingTest, FollowsAgesThroughSlots) {
  auto ring = ring_of({{"hidden", Shape{1, 2, 2}}});
  ASSERT_TRUE(ring.ok());
  const float mix[] = {1.0f, 2.0f, 3.0f};
  ASSERT_TRUE(ring->push().ok());
  ASSERT_TRUE(ring->set_mix(mix, 3).ok());
  const float* slots = ring->mix().as<float>();
  EXPECT_EQ(slots[0], 1.0f);
  EXPECT_EQ(slots[1], 0.0f);  // nothing there yet
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(ring->push().ok());
  EXPECT_EQ(ring->next_slot(), 1);
  ASSERT_TRUE(ring->set_mix(mix, 3).ok());
  EXPECT_EQ(slots[0], 1.0f);
  EXPECT_EQ(slots[2], 2.0f);
  EXPECT_EQ(slots[1], 3.0f);
}

TEST(RingTest, WritesASlotInPlaceWhereEnginesTakeItsAddress) {
  auto ring = ring_of({{"hidden", Shape{1, 4, 16}}});
  ASSERT_TRUE(ring.ok());
  EXPECT_EQ(ring->slot("hidden", 1).as<float>() - ring->history("hidden").as<float>(), 64);
}

TEST(RingTest, WritesBesideWhereASlotIsNotAligned) {
  auto ring = ring_of({{"hidden", Shape{1, 2, 2}}});
  ASSERT_TRUE(ring.ok());
  const float* history = ring->history("hidden").as<float>();
  for (int step = 0; step < 5; ++step) {
    const Tensor slot = ring->slot("hidden", ring->next_slot());
    EXPECT_EQ(slot.data, ring->slot("hidden", 0).data);
    std::fill_n(slot.as<float>(), 4, static_cast<float>(step + 1));
    ASSERT_TRUE(ring->push().ok());
  }
  EXPECT_EQ(history[0], 4.0f);
  EXPECT_EQ(history[4], 5.0f);
  EXPECT_EQ(history[8], 3.0f);
}

TEST(RingTest, StreamsOfOtherSizesMoveTogether) {
  auto ring = ring_of({{"hidden", Shape{1, 4, 16}}, {"audio_hidden", Shape{1, 3, 1}}});
  ASSERT_TRUE(ring.ok());
  for (int step = 0; step < 4; ++step) {
    for (const char* stream : {"hidden", "audio_hidden"}) {
      const Tensor slot = ring->slot(stream, ring->next_slot());
      std::fill_n(slot.as<float>(), slot.shape.elements(), static_cast<float>(step + 1));
    }
    EXPECT_TRUE(ring->is_next_finite());
    ASSERT_TRUE(ring->push().ok());
  }
  EXPECT_EQ(ring->history("hidden").as<float>()[0], 4.0f);
  EXPECT_EQ(ring->history("hidden").as<float>()[64], 2.0f);
  EXPECT_EQ(ring->history("audio_hidden").as<float>()[0], 4.0f);
  EXPECT_EQ(ring->history("audio_hidden").as<float>()[3], 2.0f);
  ring->slot("audio_hidden", 1).as<float>()[2] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(ring->is_next_finite());
  ASSERT_TRUE(ring->reset().ok());
  EXPECT_EQ(ring->history("hidden").as<float>()[64], 0.0f);
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "streams.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

TEST(StreamsTest, NamesHaveThePrefixOfWhatTheyBelongTo) {
  EXPECT_EQ(beside("audio_hidden", kHidden, kHistory), "audio_history");
  EXPECT_EQ(beside("hidden", kHidden, kResidual), "residual");
  EXPECT_EQ(beside("audio_latents", kLatents, kModelOutput), "audio_model_output");
}

TEST(StreamsTest, AStreamIsWhatAnOutputPassesOn) {
  EXPECT_EQ(stream_of("audio_hidden_out"), "audio_hidden");
  EXPECT_EQ(stream_of("attention_output"), "");
  EXPECT_EQ(stream_of("_out"), "");
}

}  // namespace
}  // namespace freewheel

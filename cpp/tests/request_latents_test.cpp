// SPDX-License-Identifier: Apache-2.0
#include "request_latents.h"

#include <gtest/gtest.h>

#include "freewheel/sampler.h"
#include "tiny_bundle.h"

namespace freewheel {
namespace {

/// A manifest of a video and its sound: the prompt tells how long the sound is.
class RequestLatentsTest : public ::testing::Test {
 protected:
  RequestLatentsTest() {
    nlohmann::json data = testing::write_tiny_bundle(folder_);
    testing::add_sound(data);
    auto parsed = Manifest::parse(data.dump(), "manifest.json");
    EXPECT_TRUE(parsed.ok()) << parsed.status().message();
    manifest_ = std::move(parsed).value();
    defaults_ = manifest_.configs.at("plain").generation;
    prepared_.run.prompts["cond"]["audio_places"] = view(places_, Shape{7});
  }
  static Tensor view(std::vector<float>& values, const Shape& shape) {
    return {values.data(), DType::kFloat32, shape};
  }
  Status settle() { return settle_latents(manifest_, request_, defaults_, prepared_); }

  testing::TemporaryFolder folder_;
  Manifest manifest_;
  GenerationDefaults defaults_;
  std::vector<float> places_ = std::vector<float>(7), video_ = std::vector<float>(96);
  Request request_;
  PreparedRun prepared_;
};

TEST_F(RequestLatentsTest, AllIsDrawnOfOneSeedInTheSizeThatThePromptTells) {
  request_.seed = 5;
  ASSERT_TRUE(settle().ok());
  const RunRequest& run = prepared_.run;
  const Tensor& sound = run.beside.at("audio_latents").latents;
  ASSERT_EQ(sound.shape, (Shape{1, 7, 3}));
  std::vector<float> first(static_cast<std::size_t>(run.latents.shape.elements())), second(21);
  Noise noise(5);
  noise.fill(first.data(), run.latents.shape.elements());
  noise.fill(second.data(), 21);
  EXPECT_EQ(std::vector<float>(sound.as<float>(), sound.as<float>() + 21), second);
  EXPECT_TRUE(check_latents(manifest_, run).ok());
}

TEST_F(RequestLatentsTest, NoiseOfNoKnownSizeIsAskedFor) {
  prepared_.run.prompts.clear();
  const Status status = settle();
  EXPECT_EQ(status.where(), "input 'audio_latents'");
  EXPECT_EQ(status.hint(), "give host float32 [batch, audio_tokens, 3]");
}

TEST_F(RequestLatentsTest, GivenLatentsAreGivenForAll) {
  request_.latents = view(video_, Shape{1, 2, 2, 4, 6});
  EXPECT_EQ(settle().what(), "is missing beside 'latents'");
  std::vector<float> sound(21, 0.5f);
  request_.beside["audio_latents"].latents = view(sound, Shape{1, 7, 3});
  ASSERT_TRUE(settle().ok());
  const Tensor& taken = prepared_.run.beside.at("audio_latents").latents;
  EXPECT_NE(taken.data, sound.data()) << "a run overwrites its own";
  EXPECT_EQ(taken.as<float>()[20], 0.5f);
}

TEST_F(RequestLatentsTest, OneBatchIsThatOfAll) {
  std::vector<float> sound(42);
  prepared_.run.latents = view(video_, Shape{1, 2, 2, 4, 6});
  prepared_.run.beside["audio_latents"].latents = view(sound, Shape{2, 7, 3});
  EXPECT_EQ(check_latents(manifest_, prepared_.run).what(), "has batch 2, others have 1");
}

TEST_F(RequestLatentsTest, WhatIsNotSampledIsRefusedByName) {
  ASSERT_TRUE(request_.set("speech_guidance_scale", std::string("7")).ok());
  const Status status = settle();
  EXPECT_EQ(status.where(), "input 'speech_latents'");
  EXPECT_NE(status.hint().find("audio_latents"), std::string::npos) << status.hint();
}

TEST_F(RequestLatentsTest, EachHasItsOwnGuidanceScale) {
  ASSERT_TRUE(request_.set("audio_guidance_scale", 7.0).ok());
  EXPECT_TRUE(Request::knows("audio_guidance_scale"));
  EXPECT_FALSE(Request::knows("guidance_scales"));
  RunRequest run;
  run.beside = request_.beside;
  EXPECT_TRUE(run.is_guided()) << "though the first has a scale of 1";
  EXPECT_EQ(run.scale_of("audio_latents", 0), 7.0);
  EXPECT_EQ(run.scale_of("latents", 0), 1.0);
  EXPECT_EQ(run.scale_of("other_latents", 1), 1.0);
}

}  // namespace
}  // namespace freewheel

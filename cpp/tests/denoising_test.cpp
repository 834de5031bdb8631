// SPDX-License-Identifier: Apache-2.0
#include "denoising.h"

#include <gtest/gtest.h>

#include <limits>

namespace freewheel {
namespace {

/// Two samples of one channel and two values each; a table of two steps that looks one step back.
class DenoisingTest : public ::testing::Test {
 protected:
  DenoisingTest() {
    noise_ = view(latents_, Shape{2, 1, 2});
    table_.timesteps = {1000.0, 500.0};
    table_.sigmas = {1.0, 0.5};
    table_.window = 2;
    // Of the samples, newest first, then of the model's outputs.
    table_.rows = {1.0, 0.0, 2.0, 0.0, 0.5, 0.25, 1.0, 4.0};
  }
  static Tensor view(std::vector<float>& values, const Shape& shape) {
    return {values.data(), DType::kFloat32, shape};
  }
  static std::vector<float> values(const Tensor& tensor) {
    return {tensor.as<float>(), tensor.as<float>() + tensor.shape.elements()};
  }

  std::vector<float> latents_ = {1.0f, 2.0f, 3.0f, 4.0f};
  Tensor noise_, condition_;
  SamplerTable table_;
};

TEST_F(DenoisingTest, AStepIsTheTablesRowOverTheNewestSamplesAndOutputs) {
  auto run = Denoising::create(noise_, condition_, table_, host_memory());
  ASSERT_TRUE(run.ok()) << run.status().message();
  std::vector<float> output = {1.0f, 1.0f, 0.0f, -1.0f};
  ASSERT_TRUE(run->take(0, view(output, Shape{2, 1, 2})).ok());
  EXPECT_EQ(values(run->guided(7.0)), output) << "one branch is not guided";
  run->advance();
  EXPECT_EQ(values(run->sample()), (std::vector<float>{3.0f, 4.0f, 3.0f, 2.0f}));
  std::vector<float> later = {0.0f, 0.0f, 1.0f, 1.0f};
  ASSERT_TRUE(run->take(0, view(later, Shape{2, 1, 2})).ok());
  (void)run->guided(7.0);
  run->advance();
  EXPECT_EQ(run->step_index(), 2);
  EXPECT_EQ(latents_[0], 1.0f) << "the latents change when they are written";
  ASSERT_TRUE(run->check("latents").ok());
  run->write();
  EXPECT_EQ(latents_, (std::vector<float>{5.75f, 6.5f, 3.25f, -1.0f}));
}

TEST_F(DenoisingTest, GuidanceGoesFromTheSecondSideToTheFirst) {
  auto run = Denoising::create(noise_, condition_, table_, host_memory());
  ASSERT_TRUE(run.ok());
  std::vector<float> cond = {1.0f, 2.0f, 3.0f, 4.0f}, uncond = {0.0f, 1.0f, 1.0f, 4.0f};
  ASSERT_TRUE(run->take(0, view(cond, Shape{2, 1, 2})).ok());
  ASSERT_TRUE(run->take(1, view(uncond, Shape{2, 1, 2})).ok());
  EXPECT_EQ(values(run->guided(3.0)), (std::vector<float>{3.0f, 4.0f, 7.0f, 4.0f}));
}

TEST_F(DenoisingTest, AConditionStandsBehindTheChannelsOfEachSample) {
  std::vector<float> condition = {10.0f, 11.0f, 12.0f, 13.0f, 20.0f, 21.0f, 22.0f, 23.0f};
  condition_ = view(condition, Shape{2, 2, 2});
  auto run = Denoising::create(noise_, condition_, table_, host_memory());
  ASSERT_TRUE(run.ok()) << run.status().message();
  EXPECT_EQ(run->input().shape, (Shape{2, 3, 2}));
  EXPECT_EQ(values(run->input()), (std::vector<float>{1.0f, 2.0f, 10.0f, 11.0f, 12.0f, 13.0f, 3.0f,
                                                      4.0f, 20.0f, 21.0f, 22.0f, 23.0f}));
  condition_.shape = Shape{1, 4, 2};
  EXPECT_FALSE(Denoising::create(noise_, condition_, table_, host_memory()).ok());
}

TEST_F(DenoisingTest, AResultThatIsNotFiniteLeavesTheLatents) {
  auto run = Denoising::create(noise_, condition_, table_, host_memory());
  ASSERT_TRUE(run.ok());
  std::vector<float> output(4, std::numeric_limits<float>::infinity());
  ASSERT_TRUE(run->take(0, view(output, Shape{2, 1, 2})).ok());
  (void)run->guided(1.0);
  run->advance();
  const Status status = run->check("audio_latents");
  EXPECT_EQ(status.code(), Code::kFailed);
  EXPECT_EQ(status.where(), "audio_latents");
  EXPECT_EQ(latents_, (std::vector<float>{1.0f, 2.0f, 3.0f, 4.0f}));
}

}  // namespace
}  // namespace freewheel

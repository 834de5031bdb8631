// SPDX-License-Identifier: Apache-2.0
#include "job.h"

#include <gtest/gtest.h>

#include "freewheel/sampler.h"
#include "tiny_bundle.h"

namespace freewheel::triton {
namespace {

const std::set<std::string> kAll = {"progress", "latents", "frames", "preview"};

class JobTest : public ::testing::Test {
 protected:
  void SetUp() override {
    (void)testing::write_tiny_bundle(folder_);
    auto model = testing::load_tiny(folder_, std::make_shared<testing::Calls>());
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
    tensors_["text_states"] = {cond_.data(), DType::kFloat32, Shape{2, 3}};
    tensors_["negative_text_states"] = {uncond_.data(), DType::kFloat32, Shape{2, 3}};
    options_.steps = 4;
    options_.guidance_scale = 2.0;
    options_.frames = 5;
    options_.height = options_.width = 32;
  }
  Result<Job> make() { return make_job(*model_, served_, options_, tensors_, kAll); }
  std::string fault() {
    const auto job = make();
    return job.ok() ? "none" : job.status().message();
  }

  testing::TemporaryFolder folder_;
  std::shared_ptr<Model> model_;
  std::vector<float> cond_ = std::vector<float>(6, 0.5f), uncond_ = std::vector<float>(6, -0.5f);
  ServedOptions served_;
  RequestOptions options_;
  Tensors tensors_;
};

TEST_F(JobTest, SizesAndSeedMakeTheNoise) {
  options_.seed = 9;
  const auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  EXPECT_EQ(job->run.latents.shape, (Shape{1, 2, 2, 4, 4}));
  std::vector<float> noise(64);
  gaussian_noise(9, noise.data(), 64);
  EXPECT_EQ(std::vector<float>(job->run.latents.as<float>(), job->run.latents.as<float>() + 64),
            noise);
  EXPECT_EQ(job->seed, 9);
  EXPECT_EQ(job->run.prompts.size(), 2u);
  EXPECT_TRUE(job->wants_latents);
  EXPECT_FALSE(job->wants_frames);  // no decoder
}

TEST_F(JobTest, ItRuns) {
  options_.policy = "interval";
  auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  auto session = Session::create(model_);
  const Status status = (*session)->run(job->run);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ((*session)->statistics().policy, "interval");
}

TEST_F(JobTest, WhatIsNotSaidIsTheBundles) {
  options_ = RequestOptions();
  const auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  EXPECT_EQ(job->run.steps, 4);
  EXPECT_EQ(job->run.guidance_scale, 2.0);
  EXPECT_EQ(job->run.flow_shift, 1.0);
  EXPECT_EQ(job->seed, 9);
  EXPECT_EQ(job->run.latents.shape, (Shape{1, 2, 2, 4, 6}));
  EXPECT_EQ(job->run.cache.policy, "interval");
  EXPECT_EQ(job->run.cache.guard.limits.at("last_exact"), 0);
  options_.policy = "interval";
  EXPECT_EQ(make()->run.cache.guard.limits.at("last_exact"), 1) << "as the policy by its name";
}

TEST_F(JobTest, OverridesGoToThePolicyAndToItsGuard) {
  options_.policy = "interval";
  options_.overrides = {{"interval", std::int64_t{2}}, {"last_exact", std::int64_t{1}}};
  EXPECT_EQ(make()->run.cache.guard.limits.at("last_exact"), 1);
  EXPECT_EQ(make()->run.cache.parameters.at("interval"), Value(std::int64_t{2}));
  options_.overrides = {{"policy.interval", std::int64_t{3}}};
  EXPECT_EQ(make()->run.cache.parameters.at("interval"), Value(std::int64_t{3}));
  options_.overrides = {{"intervall", std::int64_t{2}}};
  EXPECT_NE(fault().find("did you mean 'interval'"), std::string::npos) << fault();
}

TEST_F(JobTest, OneBranchNeedsNoNegativePrompt) {
  tensors_.erase("negative_text_states");
  options_.guidance_scale = 1.0;
  EXPECT_EQ(make()->run.prompts.count("uncond"), 0u);
}

TEST_F(JobTest, GivenLatentsAreCopied) {
  std::vector<float> given(64, 0.25f);
  tensors_["latents"] = {given.data(), DType::kFloat32, Shape{2, 2, 4, 4}};
  EXPECT_NE(fault().find("comes with a size"), std::string::npos) << fault();
  options_.frames = options_.height = options_.width = std::nullopt;
  const auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  EXPECT_NE(job->run.latents.data, given.data());
  EXPECT_EQ(job->run.latents.as<float>()[63], 0.25f);
  EXPECT_FALSE(job->seed);
}

TEST_F(JobTest, AbsurdSizesAreRefusedBeforeAnythingIsAllocated) {
  for (const auto& [height, frames] : {std::pair<std::int64_t, std::int64_t>{1LL << 31, 1},
                                       {1LL << 20, 1},
                                       {32, (1LL << 30) + 1}}) {
    options_.height = options_.width = height;
    options_.frames = frames;
    EXPECT_NE(fault().find("max_pixels"), std::string::npos) << fault();
  }
  options_.height = options_.width = 32;
  options_.frames = 6;
  EXPECT_NE(fault().find("multiple of 4"), std::string::npos) << fault();
  options_.frames = 5;
  options_.width = 36;
  EXPECT_NE(fault().find("multiple of 8"), std::string::npos) << fault();
}

TEST_F(JobTest, RefusesWhatTheBundleCanNotDo) {
  options_.steps = 5;
  EXPECT_NE(fault().find("has no table for 5 steps"), std::string::npos) << fault();
  options_.steps = 4;
  options_.outputs = {"frames"};
  EXPECT_NE(fault().find("--with-vae"), std::string::npos) << fault();
  options_.outputs = {};
  std::int64_t id = 1;
  tensors_["token_ids"] = {&id, DType::kInt64, Shape{1}};
  EXPECT_NE(fault().find("input 'token_ids'"), std::string::npos) << fault();
}

TEST_F(JobTest, ASeedThatDisagreesIsRefused) {
  std::int64_t seed = 3;
  tensors_["seed"] = {&seed, DType::kInt64, Shape{1}};
  EXPECT_EQ(make()->seed, 3);
  options_.seed = 4;
  EXPECT_NE(fault().find("give one of them"), std::string::npos) << fault();
  options_.seed = std::nullopt;
  seed = -1;
  EXPECT_NE(fault().find("input 'seed'"), std::string::npos) << fault();
}

TEST_F(JobTest, APreviewIsTheSampleLessItsNoise) {
  std::vector<float> sample(64, 1.0f), output(64, 0.5f);
  SampleEvent event;
  event.sigma = 0.5;
  event.sample = {sample.data(), DType::kFloat32, Shape{1, 2, 2, 4, 4}};
  event.model_output = {output.data(), DType::kFloat32, Shape{1, 2, 2, 4, 4}};
  const auto preview = preview_of(*model_, event);
  ASSERT_TRUE(preview.ok());
  EXPECT_EQ(preview->view().as<float>()[5], 0.75f);
  EXPECT_EQ(without_batch(preview->view()).shape, (Shape{2, 2, 4, 4}));
}

}  // namespace
}  // namespace freewheel::triton

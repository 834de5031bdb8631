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
    options_.request.steps = 4;
    options_.request.guidance_scale = 2.0;
    options_.request.frames = 5;
    options_.request.height = options_.request.width = 32;
  }
  Result<Job> make() { return make_job(*model_, served_, options_, tensors_, texts_, kAll); }
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
  std::map<std::string, std::string> texts_;
};

TEST_F(JobTest, TextNeedsATokenizer) {
  texts_["text_input"] = "a red circle";
  EXPECT_NE(fault().find("the bundle has no tokenizer"), std::string::npos) << fault();
  texts_ = {{"seed", "9"}};
  EXPECT_NE(fault().find("input 'seed': is text"), std::string::npos) << fault();
}

TEST_F(JobTest, SizesAndSeedMakeTheNoise) {
  options_.request.seed = 9;
  const auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  EXPECT_EQ(job->prepared.run.latents.shape, (Shape{1, 2, 2, 4, 4}));
  std::vector<float> noise(64);
  gaussian_noise(9, noise.data(), 64);
  EXPECT_EQ(std::vector<float>(job->prepared.run.latents.as<float>(),
                               job->prepared.run.latents.as<float>() + 64),
            noise);
  EXPECT_EQ(job->prepared.seed, 9);
  EXPECT_EQ(job->prepared.run.prompts.size(), 2u);
  EXPECT_EQ(job->wanted_latents, std::vector<std::string>{"latents"});
  EXPECT_FALSE(job->wants_frames);  // no decoder
}

TEST_F(JobTest, WhatIsSampledBesideTheFirstComesAndGoesByItsName) {
  const testing::TemporaryFolder folder;
  nlohmann::json data = testing::write_tiny_bundle(folder);
  testing::add_sound(data);
  testing::write_manifest(folder, data);
  auto model = testing::load_tiny(folder, std::make_shared<testing::Calls>());
  ASSERT_TRUE(model.ok()) << model.status().message();
  model_ = *model;
  std::vector<float> places(7), noise(21, 0.25f);
  tensors_["audio_places"] = {places.data(), DType::kFloat32, Shape{7}};
  const auto drawn = make();
  ASSERT_TRUE(drawn.ok()) << drawn.status().message();
  EXPECT_EQ(drawn->prepared.run.beside.at("audio_latents").latents.shape, (Shape{1, 7, 3}));
  EXPECT_EQ(drawn->wanted_latents, std::vector<std::string>{"latents"}) << "as the client asked";
  tensors_["audio_latents"] = {noise.data(), DType::kFloat32, Shape{7, 3}};
  auto options = RequestOptions::read({{"audio_guidance_scale", 7.0}});
  ASSERT_TRUE(options.ok()) << options.status().message();
  options_.request.beside = options->request.beside;
  options_.outputs = {"audio_latents"};
  const auto given =
      make_job(*model_, served_, options_, tensors_, texts_, {"latents", "audio_latents"});
  ASSERT_TRUE(given.ok()) << given.status().message();
  EXPECT_EQ(given->prepared.run.beside.at("audio_latents").latents.as<float>()[20], 0.25f);
  EXPECT_EQ(given->prepared.run.scale_of("audio_latents", 0), 7.0);
  EXPECT_EQ(given->wanted_latents, std::vector<std::string>{"audio_latents"});
  options_.outputs = {"sound"};
  EXPECT_NE(fault().find("name some of progress, latents, audio_latents"), std::string::npos)
      << fault();
}

TEST_F(JobTest, ItRuns) {
  options_.request.cache = "interval";
  auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  auto session = Session::create(model_);
  const Status status = (*session)->run(job->prepared.run);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ((*session)->statistics().policy, "interval");
}

TEST_F(JobTest, AnUnknownParameterIsToldWhatARequestHas) {
  const auto options = RequestOptions::read({{"guidence_scale", 3.0}, {"steps", std::int64_t{4}}});
  ASSERT_TRUE(options.ok());
  options_ = *options;
  EXPECT_NE(fault().find("did you mean 'guidance_scale'"), std::string::npos) << fault();
  options_ = *RequestOptions::read({{"outputs", std::string("latents")}, {"streem", 1.0}});
  EXPECT_NE(fault().find("did you mean 'stream'"), std::string::npos) << fault();
}

TEST_F(JobTest, OneBranchNeedsNoNegativePrompt) {
  tensors_.erase("negative_text_states");
  options_.request.guidance_scale = 1.0;
  EXPECT_EQ(make()->prepared.run.prompts.count("uncond"), 0u);
}

TEST_F(JobTest, GivenLatentsAreCopied) {
  std::vector<float> given(64, 0.25f);
  tensors_["latents"] = {given.data(), DType::kFloat32, Shape{2, 2, 4, 4}};
  EXPECT_NE(fault().find("comes with a size"), std::string::npos) << fault();
  options_.request.frames = options_.request.height = options_.request.width = std::nullopt;
  const auto job = make();
  ASSERT_TRUE(job.ok()) << job.status().message();
  EXPECT_NE(job->prepared.run.latents.data, given.data());
  EXPECT_EQ(job->prepared.run.latents.as<float>()[63], 0.25f);
  EXPECT_FALSE(job->prepared.seed);
}

TEST_F(JobTest, SizesThatAreNotServedAreRefusedBeforeAnythingIsAllocated) {
  options_.request.height = options_.request.width = std::int64_t{1} << 15;
  options_.request.frames = (1 << 15) - 3;
  EXPECT_NE(fault().find("max_pixels"), std::string::npos) << fault();
  options_.request.frames = options_.request.height = options_.request.width = std::nullopt;
  served_.max_pixels = 5 * 32 * 47;
  std::vector<float> given(2 * 2 * 4 * 6);
  tensors_["latents"] = {given.data(), DType::kFloat32, Shape{2, 2, 4, 6}};
  EXPECT_NE(fault().find("max_pixels"), std::string::npos) << "of latents too: " << fault();
  served_.max_pixels = 5 * 32 * 48;
  EXPECT_EQ(fault(), "none");
}

TEST_F(JobTest, RefusesWhatTheBundleCanNotDo) {
  options_.request.steps = 5;
  EXPECT_NE(fault().find("has no table for 5 steps"), std::string::npos) << fault();
  options_.request.steps = 4;
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
  EXPECT_EQ(make()->prepared.seed, 3);
  options_.request.seed = 4;
  EXPECT_NE(fault().find("give one of them"), std::string::npos) << fault();
  options_.request.seed = std::nullopt;
  seed = -1;
  EXPECT_NE(fault().find("seed: is -1"), std::string::npos) << fault();
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

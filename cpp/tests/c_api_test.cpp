// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "freewheel/freewheel.h"
#include "freewheel/status.h"
#include "tiny_bundle.h"

namespace {

TEST(CApi, StatusValuesAreThoseOfTheLibrary) {
  EXPECT_EQ(static_cast<int>(freewheel::Code::kInternal), FREEWHEEL_INTERNAL);
  EXPECT_EQ(static_cast<int>(freewheel::Code::kNotFinite), FREEWHEEL_NOT_FINITE);
  EXPECT_EQ(static_cast<int>(freewheel::Code::kCancelled), FREEWHEEL_CANCELLED);
  EXPECT_STREQ(freewheel_status_name(FREEWHEEL_REQUEST), "request");
  EXPECT_STREQ(freewheel_status_name(static_cast<freewheel_status>(99)), "unknown");
  EXPECT_GT(std::string(freewheel_version()).size(), 0u);
}

TEST(CApi, AFailedModelTellsWhy) {
  freewheel_model* model = nullptr;
  EXPECT_EQ(freewheel_model_create("/no/such/bundle", nullptr, &model), FREEWHEEL_BUNDLE);
  ASSERT_NE(model, nullptr);
  EXPECT_NE(std::string(freewheel_model_last_error(model)).find("manifest.json"),
            std::string::npos);
  freewheel_session* session = nullptr;
  EXPECT_EQ(freewheel_session_create(model, &session), FREEWHEEL_REQUEST);
  const char* json = nullptr;
  EXPECT_EQ(freewheel_session_statistics(session, &json), FREEWHEEL_REQUEST);
  freewheel_session_destroy(session);
  freewheel_model_destroy(model);
}

TEST(CApi, NullIsNeverFollowed) {
  EXPECT_EQ(freewheel_model_create("x", nullptr, nullptr), FREEWHEEL_REQUEST);
  freewheel_model* model = nullptr;
  EXPECT_EQ(freewheel_model_create(nullptr, nullptr, &model), FREEWHEEL_REQUEST);
  freewheel_model_destroy(model);
  freewheel_model_destroy(nullptr);
  freewheel_session_destroy(nullptr);
  freewheel_session_cancel(nullptr);
  EXPECT_EQ(freewheel_session_run(nullptr, nullptr), FREEWHEEL_REQUEST);
  EXPECT_STREQ(freewheel_model_last_error(nullptr), "");
  freewheel_noise(1, nullptr, 5);
}

/// Runs the bundle that FREEWHEEL_TEST_BUNDLE names.
class CApiRun : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* folder = std::getenv("FREEWHEEL_TEST_BUNDLE");
    if (folder == nullptr) GTEST_SKIP() << "FREEWHEEL_TEST_BUNDLE names no bundle";
    freewheel_model_options options = {};
    options.struct_size = sizeof options;
    ASSERT_EQ(freewheel_model_create(folder, &options, &model_), FREEWHEEL_OK)
        << freewheel_model_last_error(model_);
    ASSERT_EQ(freewheel_session_create(model_, &session_), FREEWHEEL_OK);
    run_.struct_size = sizeof run_;
    run_.latents = latents_.data();
    run_.latents_shape = shape_;
    run_.latents_rank = 5;
    run_.prompts = prompts_;
    run_.prompt_count = 2;
    run_.steps = 4;
    run_.guidance_scale = 3.0;
    run_.has_seed = 1;
    run_.seed = 5;
    run_.cache = "taylorseer";
  }
  void TearDown() override {
    freewheel_session_destroy(session_);
    freewheel_model_destroy(model_);
  }

  freewheel_model* model_ = nullptr;
  freewheel_session* session_ = nullptr;
  const int64_t shape_[5] = {1, 16, 1, 4, 4};
  const int64_t text_shape_[3] = {1, 6, 128};
  std::vector<float> latents_ = std::vector<float>(256), text_ = std::vector<float>(6 * 128, 0.1f);
  const freewheel_prompt prompts_[2] = {{"cond", "text_states", text_.data(), text_shape_, 3},
                                        {"uncond", "text_states", text_.data(), text_shape_, 3}};
  freewheel_run_options run_ = {};
};

TEST_F(CApiRun, RunsAndTellsWhatItDid) {
  int events = 0;
  run_.user = &events;
  run_.progress = [](const freewheel_progress* progress, void* user) {
    EXPECT_EQ(progress->struct_size, sizeof(freewheel_progress));
    EXPECT_EQ(progress->steps, 4);
    ++*static_cast<int*>(user);
    return 0;
  };
  const freewheel_parameter parameter = {"interval", "2"};
  run_.parameters = &parameter;
  run_.parameter_count = 1;
  ASSERT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_OK)
      << freewheel_session_last_error(session_);
  EXPECT_EQ(events, 8);
  for (float value : latents_) ASSERT_TRUE(std::isfinite(value));
  const char* json = nullptr;
  ASSERT_EQ(freewheel_session_statistics(session_, &json), FREEWHEEL_OK);
  const auto statistics = nlohmann::json::parse(json);
  EXPECT_EQ(statistics["branches"]["cond"]["computed"], nlohmann::json({true, false, true, false}));
  ASSERT_EQ(freewheel_model_describe(model_, &json), FREEWHEEL_OK);
  EXPECT_TRUE(nlohmann::json::parse(json)["policies"].contains("taylorseer"));
  // An older caller knows fewer fields.
  run_.struct_size = offsetof(freewheel_run_options, parameters);
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_OK);
}

TEST_F(CApiRun, OffloadedWeightsGiveTheSame) {
  const std::vector<float> noise = latents_;
  ASSERT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_OK);
  const std::vector<float> expected = latents_;
  freewheel_model_options options = {};
  options.struct_size = sizeof options;
  options.offload = 1;
  freewheel_model* model = nullptr;
  ASSERT_EQ(freewheel_model_create(std::getenv("FREEWHEEL_TEST_BUNDLE"), &options, &model),
            FREEWHEEL_OK);
  freewheel_session* session = nullptr;
  ASSERT_EQ(freewheel_session_create(model, &session), FREEWHEEL_OK);
  latents_ = noise;
  run_.latents = latents_.data();
  EXPECT_EQ(freewheel_session_run(session, &run_), FREEWHEEL_OK);
  EXPECT_EQ(latents_, expected);
  freewheel_session_destroy(session);
  freewheel_model_destroy(model);
}

TEST_F(CApiRun, TwoExpertsOfEqualWeightsGiveWhatOneGives) {
  const std::vector<float> noise = latents_;
  run_.cache = "off";
  ASSERT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_OK);
  const std::vector<float> expected = latents_;

  freewheel::testing::TemporaryFolder folder;
  const std::filesystem::path whole = folder.path() + "/bundle";
  std::filesystem::copy(
      std::getenv("FREEWHEEL_TEST_BUNDLE"), whole,
      std::filesystem::copy_options::recursive | std::filesystem::copy_options::create_hard_links);
  std::ifstream read(whole / "manifest.json");
  auto manifest = nlohmann::json::parse(read);
  const nlohmann::json tensors = manifest["tensors"];
  for (const auto& [name, tensor] : tensors.items()) {
    manifest["tensors"]["transformer_2." + name] = tensor;
  }
  manifest["experts"] = {
      {{"part", "transformer"}, {"prefix", ""}, {"from_timestep", 700.0}},
      {{"part", "transformer_2"}, {"prefix", "transformer_2."}, {"from_timestep", 0.0}}};
  std::filesystem::remove(whole / "manifest.json");
  std::ofstream(whole / "manifest.json") << manifest.dump();

  freewheel_model_options options = {};
  options.struct_size = sizeof options;
  freewheel_model* model = nullptr;
  ASSERT_EQ(freewheel_model_create(whole.c_str(), &options, &model), FREEWHEEL_OK)
      << freewheel_model_last_error(model);
  freewheel_session* session = nullptr;
  ASSERT_EQ(freewheel_session_create(model, &session), FREEWHEEL_OK);
  latents_ = noise;
  run_.latents = latents_.data();
  EXPECT_EQ(freewheel_session_run(session, &run_), FREEWHEEL_OK)
      << freewheel_session_last_error(session);
  // Tables of fewer timesteps are rounded otherwise: 1e-6 was seen.
  for (std::size_t i = 0; i < latents_.size(); ++i) {
    ASSERT_NEAR(latents_[i], expected[i], 1e-4 * (1.0 + std::abs(expected[i]))) << i;
  }
  // No cache crosses the switch: each expert computes its first step.
  run_.cache = "taylorseer";
  const char* json = nullptr;
  ASSERT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_OK);
  ASSERT_EQ(freewheel_session_statistics(session_, &json), FREEWHEEL_OK);
  const auto alone = nlohmann::json::parse(json)["branches"]["cond"]["computed"];
  const auto before = std::count(alone.begin(), alone.end(), true);
  ASSERT_EQ(freewheel_session_run(session, &run_), FREEWHEEL_OK);
  ASSERT_EQ(freewheel_session_statistics(session, &json), FREEWHEEL_OK);
  const auto computed = nlohmann::json::parse(json)["branches"]["cond"]["computed"];
  ASSERT_EQ(computed.size(), 4u);
  EXPECT_TRUE(computed[0]);
  EXPECT_GT(std::count(computed.begin(), computed.end(), true), before);
  freewheel_session_destroy(session);
  freewheel_model_destroy(model);
}

TEST_F(CApiRun, ACallbackCancels) {
  run_.progress = [](const freewheel_progress* progress, void*) {
    return progress->step_index == 1 ? 1 : 0;
  };
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_CANCELLED);
  EXPECT_STREQ(freewheel_session_last_error(session_), "run: was cancelled");
}

TEST_F(CApiRun, BadOptionsAreRefused) {
  run_.struct_size = 4;
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_REQUEST);
  run_.struct_size = sizeof run_;
  run_.cache = "nothing";
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_CONFIG);
  run_.cache = nullptr;
  run_.latents_rank = 99;
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_REQUEST);
  run_.latents_rank = 5;
  run_.prompt_count = 0;
  EXPECT_EQ(freewheel_session_run(session_, &run_), FREEWHEEL_REQUEST);
}

}  // namespace

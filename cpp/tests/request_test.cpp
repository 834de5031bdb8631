// SPDX-License-Identifier: Apache-2.0
#include "freewheel/request.h"

#include <gtest/gtest.h>

#include <cmath>

#include "freewheel/sampler.h"
#include "tiny_bundle.h"

namespace freewheel {
namespace {

void expect_says(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

class RequestTest : public ::testing::Test {
 protected:
  RequestTest() {
    manifest_ = testing::write_tiny_bundle(folder_);
    load();
    for (std::size_t side = 0; side < 2; ++side) {
      request_.prompts[kSides[side]]["text_states"] = {states_[side].data(), DType::kFloat32,
                                                       Shape{1, 2, 3}};
    }
  }
  void load() {
    testing::write_manifest(folder_, manifest_);
    auto model = testing::load_tiny(folder_, calls_);
    EXPECT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
  }
  /// Adds a config "huge", of 20 times the size.
  void with_a_huge_config() {
    manifest_["configs"]["huge"] = manifest_["configs"]["plain"];
    manifest_["configs"]["huge"]["generation"]["height"] = 640;
    load();
  }
  Result<PreparedRun> prepare() { return prepare_run(*model_, request_); }
  /// What is wrong with the request, which must be found before anything is computed.
  std::string fault() {
    const auto prepared = prepare();
    EXPECT_FALSE(prepared.ok());
    EXPECT_EQ(calls_->head + calls_->prompt, 0);
    const Status& status = prepared.status();
    EXPECT_FALSE(status.where().empty() || status.hint().empty()) << status.message();
    return status.message();
  }

  testing::TemporaryFolder folder_;
  nlohmann::json manifest_;
  std::shared_ptr<testing::Calls> calls_ = std::make_shared<testing::Calls>();
  std::shared_ptr<Model> model_;
  std::vector<float> states_[2] = {std::vector<float>(6, 0.5f), std::vector<float>(6, -0.5f)};
  Request request_;
};

TEST_F(RequestTest, WhatIsNotSaidIsTheConfigs) {
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  const RunRequest& run = prepared->run;
  EXPECT_EQ(run.steps, 4);
  EXPECT_EQ(run.guidance_scale, 2.0);
  EXPECT_EQ(run.flow_shift, 1.0);
  EXPECT_EQ(run.latents.shape, (Shape{1, 2, 2, 4, 6}));
  EXPECT_EQ(run.cache.policy, "interval");
  EXPECT_EQ(run.cache.guard.limits.at("last_exact"), 0);
  EXPECT_EQ(prepared->seed, 9u);
  EXPECT_TRUE(run.warnings.empty());
  request_.cache = "interval";
  EXPECT_EQ(prepare()->run.cache.guard.limits.at("last_exact"), 1) << "as the policy by its name";
}

TEST_F(RequestTest, AConfigsSamplerAndSecondGuidanceHoldWhereARequestSaysNothing) {
  nlohmann::json& generation = manifest_["configs"]["plain"]["generation"];
  generation["sampler"] = "steps_1000_500";
  load();
  EXPECT_NE(fault().find("sampler 'steps_1000_500': is not in the bundle"), std::string::npos);
  request_.sampler = "euler";
  EXPECT_TRUE(prepare().ok());
  generation["guidance_scale_2"] = 3.5;
  load();
  EXPECT_NE(fault().find("guidance_scale_2: is given"), std::string::npos);
  request_.guidance_scale = 2.0;
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  EXPECT_FALSE(prepared->run.guidance_scale_2);
}

TEST_F(RequestTest, WhatIsSaidComesFirst) {
  const std::vector<std::pair<std::string, Value>> said = {
      {"policy", std::string("off")}, {"sampler", std::string("euler")},
      {"steps", std::string("12")},   {"seed", std::int64_t{3}},
      {"frames", std::int64_t{1}},    {"height", std::string("64")},
      {"width", std::int64_t{32}},    {"guidance_scale", std::int64_t{3}},
      {"guidance_scale_2", 2.5},      {"flow_shift", std::string("1.0")},
      {"force", std::string("true")}, {"lora", std::string()}};
  ASSERT_EQ(said.size(), Request::names().size());
  for (const auto& [name, value] : said) {
    const Status status = request_.set(name, value);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  EXPECT_EQ(request_.guidance_scale_2, 2.5);
  EXPECT_TRUE(request_.force);
  request_.guidance_scale_2.reset();  // the bundle has one expert
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  EXPECT_EQ(prepared->run.cache.policy, "off");
  EXPECT_EQ(prepared->run.sampler, "euler");
  EXPECT_EQ(prepared->run.steps, 12);
  EXPECT_EQ(prepared->run.guidance_scale, 3.0);
  EXPECT_EQ(prepared->run.latents.shape, (Shape{1, 2, 1, 8, 4}));
  std::vector<float> noise(64);
  gaussian_noise(3, noise.data(), 64);
  const float* drawn = prepared->run.latents.as<float>();
  EXPECT_EQ(std::vector<float>(drawn, drawn + 64), noise);
}

TEST_F(RequestTest, AValueOfAnotherKindIsRefused) {
  const std::vector<std::pair<std::string, Value>> bad = {{"steps", 2.5},
                                                          {"steps", std::string("many")},
                                                          {"steps", std::string("1e400")},
                                                          {"height", true},
                                                          {"seed", std::int64_t{-1}},
                                                          {"seed", std::string("x")},
                                                          {"guidance_scale", std::string("nan")},
                                                          {"guidance_scale", true},
                                                          {"policy", 3.0},
                                                          {"sampler", false},
                                                          {"force", std::int64_t{1}}};
  for (const auto& [name, value] : bad) {
    const Status status = request_.set(name, value);
    EXPECT_EQ(status.code(), Code::kRequest) << name << " " << value_text(value);
    EXPECT_EQ(status.where(), name);
    EXPECT_FALSE(status.hint().empty());
  }
  expect_says(request_.set("stepz", 2.5).message(), "did you mean 'steps'");
}

TEST_F(RequestTest, NumbersThatNoRunTakesAreRefused) {
  const auto said = [&](const std::function<void(Request&)>& change) {
    const Request before = request_;
    change(request_);
    const std::string message = fault();
    request_ = before;
    return message;
  };
  expect_says(said([](Request& r) { r.steps = 0; }), "has no table for 0 steps");
  expect_says(said([](Request& r) { r.steps = std::int64_t{1} << 40; }), "has no table for");
  expect_says(said([](Request& r) { r.height = 0; }), "height: is 0, expected a multiple of 8");
  expect_says(said([](Request& r) { r.width = INT64_MAX; }), "expected 32768 pixels at most");
  expect_says(said([](Request& r) { r.frames = INT64_MIN; }), "1 more than a multiple of 4");
  expect_says(said([](Request& r) { r.seed = UINT64_MAX; }),
              "seed: is 18446744073709551615; give a whole number from 0 to 9223372036854775807");
  expect_says(said([](Request& r) { r.guidance_scale = INFINITY; }), "guidance_scale: is not");
  expect_says(said([](Request& r) { r.guidance_scale_2 = 2.0; }), "has one expert");
  expect_says(said([](Request& r) { r.flow_shift = NAN; }), "flow shift");
  expect_says(said([](Request& r) { r.cache = "plane"; }), "did you mean 'plain'");
  expect_says(said([](Request& r) { r.sampler = "ddim"; }), "is not in the bundle");
}

TEST_F(RequestTest, OverridesMayBeTextAndAllFaultsAreTold) {
  request_.overrides = {{"interval", std::string("2")}, {"last_exact", std::int64_t{1}}};
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  EXPECT_EQ(prepared->run.cache.parameters.at("interval"), Value(std::int64_t{2}));
  EXPECT_EQ(prepared->run.cache.guard.limits.at("last_exact"), 1);
  request_.overrides = {{"intervall", std::int64_t{2}}, {"first_exact", std::int64_t{-1}}};
  expect_says(fault(), "2 faults: parameter 'intervall'");
  request_.overrides = {{"stream_every", std::int64_t{2}}};
  request_.also_known = {"stream"};
  expect_says(fault(), "did you mean 'stream'");
}

TEST_F(RequestTest, LatentsAreGivenOrDrawnInAShape) {
  std::vector<std::uint16_t> halves(96, half_from_float(0.25f));
  request_.latents = {halves.data(), DType::kFloat16, Shape{1, 2, 2, 4, 6}};
  const auto given = prepare();
  ASSERT_TRUE(given.ok()) << given.status().message();
  EXPECT_EQ(given->run.latents.dtype, DType::kFloat32);
  EXPECT_EQ(given->run.latents.as<float>()[95], 0.25f);
  EXPECT_FALSE(given->seed);
  request_.seed = 4;
  expect_says(fault(), "input 'latents': comes with a seed; give one of them");
  request_.seed.reset();
  request_.width = 48;
  expect_says(fault(), "comes with a size");
  request_.width.reset();
  request_.latents.shape = Shape{1, 2, 2, 4, 5};
  request_.latents.data = nullptr;
  request_.seed = 4;
  const auto drawn = prepare();
  ASSERT_TRUE(drawn.ok()) << drawn.status().message();
  std::vector<float> noise(80);
  gaussian_noise(4, noise.data(), 80);
  EXPECT_EQ(drawn->run.latents.shape, request_.latents.shape);
  EXPECT_EQ(drawn->run.latents.as<float>()[79], noise[79]);
  request_.latents.shape = Shape{1, 3, 2, 4, 6};
  expect_says(fault(), "the bundle takes [batch, 2,");
}

TEST_F(RequestTest, AConfigOfAFarGreaterSizeIsAskedForTwice) {
  with_a_huge_config();
  std::vector<float> latents(2 * 2 * 80 * 6);
  const Shape shape{1, 2, 2, 80, 6};
  request_.cache = "huge";
  const Tensor ways[] = {
      {}, {nullptr, DType::kFloat32, shape}, {latents.data(), DType::kFloat32, shape}};
  for (const Tensor& given : ways) {
    request_.latents = given;
    request_.force = false;
    expect_says(fault(), "20 times its latents");
    request_.force = true;
    const auto prepared = prepare();
    ASSERT_TRUE(prepared.ok()) << prepared.status().message();
    ASSERT_EQ(prepared->run.warnings.size(), 1u);
    expect_says(prepared->run.warnings[0], "config 'huge' was made for");
  }
}

TEST_F(RequestTest, ARunCarriesItsWarningsOn) {
  with_a_huge_config();
  request_.cache = "huge";
  request_.height = 32;
  auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  auto session = Session::create(model_);
  ASSERT_TRUE((*session)->run(prepared->run).ok());
  const auto report = nlohmann::json::parse((*session)->statistics().json());
  EXPECT_EQ(report["warnings"][0], prepared->run.warnings.at(0));
}

TEST_F(RequestTest, NoMorePixelsThanAreServed) {
  request_.max_pixels = 5 * 32 * 48;
  EXPECT_TRUE(prepare().ok());
  request_.width = 56;
  expect_says(fault(), "5 frames of 32 x 56 are more than the 7680 pixels");
  request_.width.reset();
  std::vector<float> latents(2 * 3 * 4 * 6);
  request_.latents = {latents.data(), DType::kFloat32, Shape{1, 2, 2, 4, 6}};
  EXPECT_TRUE(prepare().ok());
  request_.latents.shape = Shape{1, 2, 3, 4, 6};
  expect_says(fault(), "9 frames of 32 x 48");
}

TEST_F(RequestTest, PromptsAreCheckedBeforeAnythingIsComputed) {
  const auto prompts = request_.prompts;
  request_.prompts["cond"]["txt_states"] = prompts.at("cond").at("text_states");
  expect_says(fault(), "branch 'cond', input 'txt_states': is not one that this bundle takes; did");
  request_.prompts = prompts;
  request_.prompts["unkond"] = prompts.at("cond");
  expect_says(fault(), "branch 'unkond': is not one of a run; did you mean 'uncond'");
  request_.prompts = prompts;
  request_.prompts["uncond"].clear();
  expect_says(fault(), "branch 'uncond', input 'text_states': is missing; give text_states");
  request_.prompts = prompts;
  request_.prompts["uncond"]["text_states"].shape = Shape{1, 3, 2};
  expect_says(fault(), "has shape [1, 3, 2], the bundle takes");
  request_.prompts.erase("uncond");
  expect_says(fault(), "branch 'uncond': has no prompt; give both prompts");
  request_.prompts.clear();
  expect_says(fault(), "branch 'cond': has no prompt");
  request_.prompts = prompts;
  request_.token_ids["cond"] = {1};
  expect_says(fault(), "was built without its text encoder");
  request_.token_ids.clear();
  request_.decodes = true;
  expect_says(fault(), "was built without its VAE decoder");
}

TEST_F(RequestTest, ABranchThatDoesNotRunIsCheckedAndLeftOut) {
  request_.guidance_scale = 1.0;
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  EXPECT_EQ(prepared->run.prompts.count("uncond"), 0u);
  states_[1][0] = NAN;
  expect_says(fault(), "branch 'uncond', input 'text_states': holds values that are not finite");
}

TEST_F(RequestTest, BranchesShareAPictureAndNoText) {
  manifest_["inputs"]["image_states"] = manifest_["inputs"]["text_states"];
  load();
  request_.prompts["cond"]["image_states"] = request_.prompts["cond"]["text_states"];
  const auto prepared = prepare();
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  const Tensors& uncond = prepared->run.prompts.at("uncond");
  EXPECT_EQ(uncond.at("image_states").data, states_[0].data());
  EXPECT_EQ(uncond.at("text_states").data, states_[1].data());
  request_.prompts["uncond"] = {{"image_states", uncond.at("image_states")}};
  expect_says(fault(), "branch 'uncond', input 'text_states': is missing");
}

}  // namespace
}  // namespace freewheel

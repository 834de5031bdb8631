// SPDX-License-Identifier: Apache-2.0
#include "freewheel/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <thread>

#include "ring.h"
#include "tiny_bundle.h"

namespace freewheel {
namespace {

using testing::TinyRun;

class SessionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    (void)testing::write_tiny_bundle(folder_);
    auto model = testing::load_tiny(folder_, calls_);
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
    session_ = make();
  }
  std::unique_ptr<Session> make() const {
    auto session = Session::create(model_);
    EXPECT_TRUE(session.ok());
    return std::move(session).value();
  }
  std::vector<float> run(Session& session, const std::string& policy, std::int64_t frames = 2) {
    TinyRun run(frames);
    run.request.cache.policy = policy;
    const Status status = session.run(run.request);
    EXPECT_TRUE(status.ok()) << status.message();
    return run.latents;
  }
  std::vector<char> computed(std::size_t branch = 0) const {
    return session_->statistics().branches.at(branch).computed;
  }

  testing::TemporaryFolder folder_;
  std::shared_ptr<testing::Calls> calls_ = std::make_shared<testing::Calls>();
  std::shared_ptr<Model> model_;
  std::unique_ptr<Session> session_;
};

TEST_F(SessionTest, OffComputesEveryStep) {
  run(*session_, "off");
  EXPECT_EQ(computed(), std::vector<char>(12, 1));
  EXPECT_EQ(calls_->block, 2 * 12 * 3);
  EXPECT_EQ(calls_->delta, 0);
  EXPECT_EQ(calls_->finish, 24);
}

TEST_F(SessionTest, AFoldedPolicyDecidesAheadAndReuses) {
  run(*session_, "interval");
  EXPECT_EQ(computed(), (std::vector<char>{1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0}));
  EXPECT_EQ(computed(1), computed(0));
  EXPECT_TRUE(session_->statistics().is_folded);
  EXPECT_EQ(calls_->reuse, 16);
  EXPECT_EQ(calls_->delta, 8);
  const BranchStatistics& cond = session_->statistics().branches.at(0);
  EXPECT_DOUBLE_EQ(cond.distance[2], 0.5);
  EXPECT_EQ(cond.mix.size(), 24u);
  EXPECT_EQ(cond.mix[2], 1.0f);
  EXPECT_DOUBLE_EQ(session_->statistics().ideal_speedup(), 3.0);
}

TEST_F(SessionTest, AFeaturePolicyTapsItsBlock) {
  run(*session_, "motion");
  EXPECT_EQ(calls_->tapped, 4);  // two computed steps of two branches
  EXPECT_EQ(computed(), (std::vector<char>{1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

TEST_F(SessionTest, ASignalOfEveryStepRotatesItsBuffers) {
  run(*session_, "signal");
  EXPECT_FALSE(session_->statistics().is_folded);
  EXPECT_EQ(computed()[0], 1);
  EXPECT_EQ(computed()[1], 0);
}

TEST_F(SessionTest, RunsForgetWhatRanBefore) {
  const std::vector<float> alone = run(*session_, "interval");
  for (const char* policy : {"motion", "off", "signal", "interval"}) run(*session_, policy, 3);
  EXPECT_EQ(run(*session_, "interval"), alone);
}

TEST_F(SessionTest, ReuseIsExactWhereTheResidualStands) {
  TinyRun first, second;
  first.request.cache.policy = "interval";
  first.request.cache.parameters["interval"] = std::int64_t{1};
  second.request.cache.policy = "off";
  ASSERT_TRUE(session_->run(first.request).ok());
  ASSERT_TRUE(session_->run(second.request).ok());
  EXPECT_EQ(first.latents, second.latents);
}

TEST_F(SessionTest, GuardStepsAreExact) {
  TinyRun run;
  run.request.cache.policy = "interval";
  run.request.cache.guard.exact_steps = {5};
  run.request.cache.guard.first_exact = 2;
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(computed(), (std::vector<char>{1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0}));
}

TEST_F(SessionTest, WithoutGuidanceOneBranchRuns) {
  TinyRun run;
  run.request.guidance_scale = 1.0;
  run.request.prompts.erase("uncond");
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(session_->statistics().branches.size(), 1u);
  EXPECT_EQ(calls_->finish, 12);
}

TEST_F(SessionTest, APromptIsEncodedOnlyWhenItChanges) {
  run(*session_, "off");
  run(*session_, "off");
  EXPECT_EQ(calls_->prompt, 2);
  TinyRun other;
  other.cond[0] = 9.0f;
  ASSERT_TRUE(session_->run(other.request).ok());
  EXPECT_EQ(calls_->prompt, 3);
}

TEST_F(SessionTest, ProgressNamesBranchStepAndDecision) {
  TinyRun run;
  run.request.cache.policy = "interval";
  std::vector<std::string> seen;
  int steps = 0;
  run.request.on_branch_step = [&](const BranchEvent& event) {
    EXPECT_EQ(event.steps, 12);
    EXPECT_GE(event.seconds, 0.0);
    seen.push_back(std::string(event.branch) + std::to_string(event.step_index) +
                   (event.computed ? "c" : "r"));
  };
  run.request.on_step = [&](const SampleEvent& event) {
    EXPECT_EQ(event.step_index, steps++);
    EXPECT_EQ(event.sample.shape, run.request.latents.shape);
    EXPECT_NE(event.sample.data, event.model_output.data);
  };
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(seen.size(), 24u);
  EXPECT_EQ(seen[0], "cond0c");
  EXPECT_EQ(seen[3], "uncond1r");
  EXPECT_EQ(steps, 12);
}

TEST_F(SessionTest, CancellingStopsBetweenEngineCallsAndLeavesTheLatents) {
  TinyRun run;
  const std::vector<float> start = run.latents;
  int at_cancel = 0;
  run.request.on_branch_step = [&](const BranchEvent& event) {
    if (event.step_index == 4) session_->cancel(), at_cancel = calls_->head;
  };
  EXPECT_EQ(session_->run(run.request).code(), Code::kCancelled);
  EXPECT_EQ(calls_->head, at_cancel);
  EXPECT_EQ(run.latents, start);
  session_->cancel();  // without a run: nothing happens
  run.request.on_branch_step = nullptr;
  EXPECT_TRUE(session_->run(run.request).ok());
}

TEST_F(SessionTest, CancellingInsideTheBodyStopsBeforeTheNextBlock) {
  TinyRun run;
  std::atomic<bool> stop{false};
  run.request.cancelled = &stop;
  calls_->on_call = [&](const std::string& graph) {
    if (graph == "block" && calls_->block == 7) stop = true;
  };
  EXPECT_EQ(session_->run(run.request).code(), Code::kCancelled);
  EXPECT_EQ(calls_->block, 8);
}

TEST_F(SessionTest, EngineFailuresAreReportedAndSurvived) {
  calls_->fail_finish = true;
  TinyRun run;
  const Status status = session_->run(run.request);
  EXPECT_EQ(status.message(), "engine 'finish': was told to fail");
  calls_->fail_finish = false;
  EXPECT_TRUE(session_->run(run.request).ok());
}

TEST_F(SessionTest, BadRequestsAreRefusedWithThreeParts) {
  const auto fault = [&](const std::function<void(TinyRun&)>& change) {
    TinyRun run;
    change(run);
    const Status status = session_->run(run.request);
    EXPECT_FALSE(status.ok());
    EXPECT_FALSE(status.where().empty());
    EXPECT_FALSE(status.hint().empty()) << status.message();
    return status;
  };
  EXPECT_EQ(fault([](TinyRun& r) { r.request.cache.policy = "intervall"; }).message(),
            "policy 'intervall': is not in the bundle; did you mean 'interval'? known: interval, "
            "motion, off, signal");
  EXPECT_EQ(fault([](TinyRun& r) {
              r.request.cache.policy = "interval";
              r.request.cache.parameters["interval"] = std::int64_t{0};
            }).code(),
            Code::kConfig);
  EXPECT_EQ(fault([](TinyRun& r) { r.request.cache.signal = "temb"; }).code(), Code::kConfig);
  (void)fault([](TinyRun& r) { r.request.steps = 0; });
  (void)fault([](TinyRun& r) { r.request.steps = std::int64_t{1} << 60; });
  (void)fault([](TinyRun& r) { r.latents[3] = std::nanf(""); });
  (void)fault([](TinyRun& r) { r.cond[0] = std::numeric_limits<float>::infinity(); });
  (void)fault([](TinyRun& r) { r.request.prompts.clear(); });
  (void)fault([](TinyRun& r) { r.request.prompts["uncond"].clear(); });
  (void)fault([](TinyRun& r) { r.request.guidance_scale = std::nan(""); });
  (void)fault([](TinyRun& r) { r.request.latents.shape = Shape{1, 1, 4, 4, 4}; });
  (void)fault([](TinyRun& r) { r.request.latents.shape = Shape{2, 2, 1, 4, 4}; });
  (void)fault([](TinyRun& r) { r.request.latents.data = nullptr; });
  (void)fault([](TinyRun& r) { r.request.prompts["cond"]["text_states"].shape = Shape{1, 3, 2}; });
  run(*session_, "interval");
}

TEST_F(SessionTest, StepsOutOfOrderAreRefused) {
  TinyRun run;
  const NamedTensor latents{"latents", run.request.latents};
  EXPECT_FALSE(session_->step("cond", 0, &latents, 1).ok());
  ASSERT_TRUE(session_->begin({1000, 500}, CacheSetting{}).ok());
  EXPECT_EQ(session_->step("cond", 0, &latents, 1).status().what(), "has no prompt");
  ASSERT_TRUE(session_->set_prompt("cond", run.request.prompts["cond"]).ok());
  EXPECT_FALSE(session_->step("cond", 1, &latents, 1).ok());
  EXPECT_TRUE(session_->step("cond", 0, &latents, 1).ok());
  EXPECT_FALSE(session_->step("cond", 0, &latents, 1).ok());
  EXPECT_TRUE(session_->step("cond", 1, &latents, 1).ok());
  EXPECT_FALSE(session_->step("cond", 2, &latents, 1).ok());
  EXPECT_FALSE(session_->step("cond", 2, nullptr, 0).ok());
  EXPECT_FALSE(session_->begin({}, CacheSetting{}).ok());
  EXPECT_FALSE(session_->begin({std::nan("")}, CacheSetting{}).ok());
  EXPECT_FALSE(session_->step("cond", 0, &latents, 1).ok());
}

TEST_F(SessionTest, SessionsShareAModelAcrossThreads) {
  const std::vector<float> alone = run(*session_, "interval");
  const std::vector<float> other = run(*session_, "motion");
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int index = 0; index < 4; ++index) {
    threads.emplace_back([&, index] {
      auto session = make();
      for (int turn = 0; turn < 20; ++turn) {
        const bool is_interval = (index + turn) % 2 == 0;
        if (run(*session, is_interval ? "interval" : "motion") != (is_interval ? alone : other)) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(SessionTest, AMissingEngineIsNamed) {
  std::filesystem::remove_all(folder_.path() + "/engines/plain-here/reuse");
  auto manifest =
      nlohmann::json::parse(*read_text(folder_.path() + "/manifest.json", 1 << 20, Code::kFailed));
  manifest["files"].erase("engines/plain-here/reuse/engine.json");
  testing::write_manifest(folder_, manifest);
  auto model = testing::load_tiny(folder_, calls_);
  ASSERT_TRUE(model.ok());
  auto session = Session::create(*model);
  TinyRun run;
  run.request.cache.policy = "interval";
  const Status status = (*session)->run(run.request);
  EXPECT_EQ(status.code(), Code::kBundle);
  EXPECT_NE(status.where().find("reuse"), std::string::npos);
}

TEST(Model, BackendsThatAreNotThereAreNamed) {
  testing::TemporaryFolder folder;
  (void)testing::write_tiny_bundle(folder);
  const auto model = Model::load(folder.path());
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), Code::kBackend);
  ModelOptions options;
  options.backend = "nonsense";
  EXPECT_EQ(Model::load(folder.path(), options).status().code(), Code::kBackend);
}

TEST(Ring, FollowsAgesThroughSlots) {
  auto ring = ResidualRing::create(host_memory(), 3, DType::kFloat32, Shape{1, 2, 2});
  ASSERT_TRUE(ring.ok());
  const float mix[] = {1.0f, 2.0f, 3.0f};
  ring->push();
  ASSERT_TRUE(ring->set_mix(mix, 3).ok());
  const float* slots = ring->mix().as<float>();
  EXPECT_EQ(slots[0], 1.0f);
  EXPECT_EQ(slots[1], 0.0f);  // nothing there yet
  for (int i = 0; i < 3; ++i) ring->push();
  EXPECT_EQ(ring->next_slot(), 1);
  ASSERT_TRUE(ring->set_mix(mix, 3).ok());
  EXPECT_EQ(slots[0], 1.0f);
  EXPECT_EQ(slots[2], 2.0f);
  EXPECT_EQ(slots[1], 3.0f);
  EXPECT_EQ(ring->slot(1).as<float>() - ring->history().as<float>(), 4);
}

}  // namespace
}  // namespace freewheel

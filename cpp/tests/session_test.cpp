// SPDX-License-Identifier: Apache-2.0
#include "freewheel/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <thread>

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
  /// 1 for each step that a branch computed, 0 for a reused one, -1 for one that it left out.
  std::vector<int> computed(std::size_t branch = 0) const {
    std::vector<int> found;
    for (const Decision decision : session_->statistics().branches.at(branch).decisions) {
      found.push_back(decision == Decision::kSkipped ? -1 : decision == Decision::kComputed);
    }
    return found;
  }

  testing::TemporaryFolder folder_;
  std::shared_ptr<testing::Calls> calls_ = std::make_shared<testing::Calls>();
  std::shared_ptr<Model> model_;
  std::unique_ptr<Session> session_;
};

TEST_F(SessionTest, OffComputesEveryStep) {
  run(*session_, "off");
  EXPECT_EQ(computed(), std::vector<int>(12, 1));
  EXPECT_EQ(calls_->block, 2 * 12 * 3);
  EXPECT_EQ(calls_->delta, 0);
  EXPECT_EQ(calls_->finish, 24);
}

TEST_F(SessionTest, OffloadedWeightsAreTheSameWeights) {
  ModelOptions options;
  options.custom_backend = testing::plain_backend(calls_);
  options.offload = true;
  const auto offloaded = Model::load(folder_.path(), options);
  ASSERT_TRUE(offloaded.ok()) << offloaded.status().message();
  const std::vector<float> expected = run(*session_, "motion");
  std::vector<float> found[2];
  std::thread others[2];  // both take turns at the two slabs
  for (int index = 0; index < 2; ++index) {
    others[index] = std::thread([&, index] {
      auto session = Session::create(*offloaded);
      ASSERT_TRUE(session.ok());
      found[index] = run(**session, "motion");
    });
  }
  for (std::thread& other : others) other.join();
  EXPECT_EQ(found[0], expected);
  EXPECT_EQ(found[1], expected);
}

TEST_F(SessionTest, WeightsInsideEnginesCanNotBeOffloaded) {
  const testing::TemporaryFolder folder;
  nlohmann::json manifest = testing::write_tiny_bundle(folder);
  manifest["weights"] = "baked";
  testing::write_manifest(folder, manifest);
  ModelOptions options;
  options.custom_backend = testing::plain_backend(calls_);
  options.offload = true;
  const auto model = Model::load(folder.path(), options);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), Code::kRequest) << model.status().message();
  EXPECT_NE(model.status().message().find("weights are inside its engines"), std::string::npos);
}

TEST_F(SessionTest, AFoldedPolicyDecidesAheadAndReuses) {
  run(*session_, "interval");
  EXPECT_EQ(computed(), (std::vector<int>{1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0}));
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

TEST_F(SessionTest, TablesThatAreStretchedAreWarnedOfBehindTheRequestsOwnWarnings) {
  TinyRun tiny;
  tiny.request.cache.policy = "interval";
  tiny.request.warnings = {"asked"};
  for (const std::int64_t made : {20, 12}) {
    tiny.request.cache.parameters["steps"] = made;
    ASSERT_TRUE(session_->run(tiny.request).ok());
    const std::vector<std::string>& found = session_->statistics().warnings;
    ASSERT_EQ(found.size(), made == 12 ? 1u : 2u);
    EXPECT_EQ(found[0], "asked");
    if (made == 12) continue;
    EXPECT_NE(found[1].find("made for 20 steps and are stretched from 20 to 12, 40% away"),
              std::string::npos);
  }
}

TEST_F(SessionTest, APolicyIsGivenTheScheduleOfThisStepAndOfTheComputedOnes) {
  std::vector<std::vector<float>> seen;
  calls_->on_schedule = [&](const std::vector<float>& given) { seen.push_back(given); };
  CacheSetting setting;
  setting.policy = "interval";
  const TinyRun tiny;
  const auto first = [&](const std::vector<double>& timesteps, const std::vector<double>& sigmas) {
    seen.clear();
    ASSERT_TRUE(session_->begin(timesteps, setting, sigmas).ok());
    ASSERT_TRUE(session_->set_prompt("cond", tiny.request.prompts.at("cond")).ok());
    const NamedTensor latents{"latents", tiny.request.latents};
    ASSERT_TRUE(session_->step("cond", 0, &latents, 1).ok());
  };
  first({900, 800, 700, 600, 500}, {5, 4, 3, 2, 1});  // folded: all are asked for at once
  EXPECT_EQ(seen, (std::vector<std::vector<float>>{{900, 5, 0, 0, 0, 0},
                                                   {800, 4, 900, 5, 0, 0},
                                                   {700, 3, 900, 5, 0, 0},
                                                   {600, 2, 900, 5, 0, 0},
                                                   {500, 1, 600, 2, 900, 5}}));
  first({900, 500}, {});  // a flow model's
  EXPECT_EQ(seen, (std::vector<std::vector<float>>{{900, 0.9f, 0, 0, 0, 0},
                                                   {500, 0.5f, 900, 0.9f, 0, 0}}));
  const Status status = session_->begin({900, 500}, setting, {1.0});
  EXPECT_EQ(status.message().find("sigmas: are [1], expected [2] finite values"), 0u)
      << status.message();
}

TEST_F(SessionTest, InnerProductsAreThoseOfTheResidualsHeldNewestFirst) {
  std::vector<std::vector<float>> seen, residuals;
  calls_->on_gram = [&](const std::vector<float>& given) { seen.push_back(given); };
  CacheSetting setting;
  setting.policy = "alike";
  ASSERT_TRUE(session_->begin({900, 800, 700, 600, 500, 400}, setting).ok());
  EXPECT_FALSE(session_->statistics().is_folded);
  const TinyRun tiny;
  ASSERT_TRUE(session_->set_prompt("cond", tiny.request.prompts.at("cond")).ok());
  for (std::int64_t step = 0; step < 6; ++step) {
    const NamedTensor latents{"latents", tiny.request.latents};
    const auto output = session_->step("cond", step, &latents, 1);
    ASSERT_TRUE(output.ok()) << output.status().message();
    if (step % 2 != 0) continue;
    residuals
        .emplace_back();  // the tiny model's output is its hidden states, its input the latents
    for (std::int64_t i = 0; i < output->shape.elements(); ++i) {
      residuals.back().push_back(output->as<float>()[i] -
                                 tiny.latents[static_cast<std::size_t>(i)]);
    }
  }
  const auto expected = [&](std::size_t held) {
    std::vector<float> found(4, 0.0f);
    for (std::size_t i = 0; held > 0 && i < residuals[0].size(); ++i) {
      const float newest = residuals[held - 1][i];
      const float change = held > 1 ? residuals[held - 2][i] - newest : 0.0f;
      found[0] += newest * newest;
      found[1] -= newest * change;
      found[2] -= newest * change;
      found[3] += change * change;
    }
    return found;
  };
  ASSERT_EQ(seen.size(), 6u);
  for (std::size_t step = 0; step < 6; ++step) {
    const std::vector<float> wanted = expected((step + 1) / 2);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(seen[step][i], wanted[i], 1e-4f * std::fabs(wanted[i]) + 1e-6f)
          << step << " " << i;
    }
  }
}

TEST_F(SessionTest, APolicyThatTakesWhatNoSessionGivesIsRefused) {
  const testing::TemporaryFolder folder;
  nlohmann::json manifest = testing::write_tiny_bundle(folder);
  manifest["graphs"]["decide.interval"]["inputs"]["weather"] = {{"dtype", "float32"},
                                                                {"shape", nlohmann::json::array()}};
  testing::write_manifest(folder, manifest);
  auto model = testing::load_tiny(folder, calls_);
  ASSERT_TRUE(model.ok()) << model.status().message();
  auto session = Session::create(*model);
  ASSERT_TRUE(session.ok());
  TinyRun tiny;
  tiny.request.cache.policy = "interval";
  EXPECT_NE((*session)
                ->run(tiny.request)
                .message()
                .find("graph 'decide.interval', input 'weather': is nothing that a session gives"),
            std::string::npos);
}

TEST_F(SessionTest, AFeaturePolicyTapsItsBlock) {
  run(*session_, "motion");
  EXPECT_EQ(calls_->tapped, 4);  // two computed steps of two branches
  EXPECT_EQ(computed(), (std::vector<int>{1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

TEST_F(SessionTest, ASignalOfEveryStepRotatesItsBuffers) {
  run(*session_, "signal");
  EXPECT_FALSE(session_->statistics().is_folded);
  EXPECT_EQ(computed()[0], 1);
  EXPECT_EQ(computed()[1], 0);
}

TEST_F(SessionTest, AProbeRunsTheFirstBlockAlwaysAndReusesTheOthers) {
  const std::vector<float> exact = run(*session_, "off");
  const int blocks = calls_->block;
  TinyRun never;
  never.request.cache.policy = "probe";
  never.request.cache.guard.limits["first_exact"] = 12;
  ASSERT_TRUE(session_->run(never.request).ok());
  EXPECT_EQ(never.latents, exact);
  EXPECT_EQ(calls_->block, 2 * blocks);
  const int before = calls_->block, deltas = calls_->delta;
  const std::vector<float> reused = run(*session_, "probe");
  const auto& branches = session_->statistics().branches;
  const std::int64_t done =
      branches[0].count(Decision::kComputed) + branches[1].count(Decision::kComputed);
  EXPECT_GT(done, 2);
  EXPECT_LT(done, 24);
  EXPECT_EQ(calls_->block - before, 24 + 2 * done);
  EXPECT_EQ(calls_->delta - deltas, done);
  EXPECT_NE(reused, exact);
  // The body gives the same whether or not its first block can run alone, tapped as well.
  EXPECT_EQ(run(*session_, "off"), exact);
  const std::vector<float> tapped = run(*session_, "motion");
  EXPECT_EQ(run(*make(), "motion"), tapped);
  EXPECT_EQ(run(*session_, "probe"), reused);
}

TEST_F(SessionTest, OneDecisionIsTakenForAllBranches) {
  std::vector<float> outputs, features, computed_signals, signals;
  calls_->on_decide = [&](const Tensor& signal, const Tensor& previous, const Tensor& past,
                          const Tensor& feature) {
    signals.push_back(signal.as<float>()[0]);
    EXPECT_EQ(previous.as<float>()[0], signals.size() > 1 ? signals[signals.size() - 2] : 0.0f);
    computed_signals.push_back(past.as<float>()[0]);
    features.push_back(feature.as<float>()[0]);
    EXPECT_EQ(feature.shape, (Shape{4, 4, 4}));
    EXPECT_EQ(signal.shape, (Shape{16, 4}));
  };
  TinyRun run;
  run.request.cache.policy = "follow";
  run.request.on_step = [&](const SampleEvent& event) {
    EXPECT_EQ(event.sample.as<float>()[0], signals.back());
  };
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(signals.size(), 12u) << "the second branch follows the first";
  EXPECT_EQ(computed(1), computed(0));
  const std::int64_t done = session_->statistics().branches[0].count(Decision::kComputed);
  EXPECT_GT(done, 2);
  EXPECT_LT(done, 12);
  float past = 0.0f, feature = 0.0f;
  for (std::size_t step = 0; step < 12; ++step) {
    EXPECT_EQ(computed_signals[step], past) << step;
    if (step > 0 && computed()[step - 1] != 0) {
      EXPECT_NE(features[step], feature) << step;
    } else {
      EXPECT_EQ(features[step], feature) << step;
    }
    feature = features[step];
    if (computed()[step] != 0) past = signals[step];
  }
  calls_->on_decide = nullptr;
  const std::vector<float> first = run.latents;
  TinyRun again;
  again.request.cache.policy = "follow";
  ASSERT_TRUE(session_->run(again.request).ok());
  EXPECT_EQ(again.latents, first);
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
  run.request.cache.guard.limits["first_exact"] = 2;
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(computed(), (std::vector<int>{1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0}));
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

TEST_F(SessionTest, ValuesThatAreNotFiniteStopTheRunWhereTheyArise) {
  const std::vector<float> expected = run(*session_, "interval");
  const std::pair<const char*, const char*> graphs[] = {{"head", "step 3, segment 'head'"},
                                                        {"block", "step 3, segment 'body'"},
                                                        {"reuse", "step 1, segment 'reuse'"},
                                                        {"finish", "step 3, segment 'finish'"}};
  for (const auto& [graph, where] : graphs) {
    TinyRun bad;
    const std::vector<float> noise = bad.latents;
    bad.request.cache.policy = "interval";
    const bool at_once = std::string(graph) == "reuse";
    bad.request.on_step = [&, name = graph](const SampleEvent& event) {
      if (event.step_index == 2) calls_->overflows = name;
    };
    if (at_once) calls_->overflows = graph;
    const Status status = session_->run(bad.request);
    calls_->overflows.clear();
    EXPECT_EQ(status.code(), Code::kNotFinite) << graph;
    EXPECT_EQ(status.where(), std::string("branch 'cond', ") + where);
    EXPECT_FALSE(status.hint().empty());
    EXPECT_EQ(bad.latents, noise) << "left as they were";
    EXPECT_EQ(run(*session_, "interval"), expected) << "and forgotten: " << graph;
  }
}

TEST_F(SessionTest, AStepAfterOneThatFailedIsRefused) {
  TinyRun given;
  const NamedTensor latents{"latents", given.request.latents};
  ASSERT_TRUE(session_->set_prompt("cond", given.request.prompts.at("cond")).ok());
  ASSERT_TRUE(session_->begin({900.0, 500.0, 100.0}, {}).ok());
  ASSERT_TRUE(session_->step("cond", 0, &latents, 1).ok());
  calls_->overflows = "finish";
  EXPECT_EQ(session_->step("cond", 1, &latents, 1).status().code(), Code::kNotFinite);
  calls_->overflows.clear();
  EXPECT_NE(session_->step("cond", 1, &latents, 1).status().message().find("call begin() first"),
            std::string::npos);
}

TEST_F(SessionTest, NoStepFollowsOneWhoseEngineFailed) {
  TinyRun given;
  const NamedTensor latents{"latents", given.request.latents};
  ASSERT_TRUE(session_->set_prompt("cond", given.request.prompts.at("cond")).ok());
  ASSERT_TRUE(session_->begin({900.0, 500.0, 100.0}, {}).ok());
  ASSERT_TRUE(session_->step("cond", 0, &latents, 1).ok());
  calls_->fail_finish = true;
  EXPECT_EQ(session_->step("cond", 1, &latents, 1).status().code(), Code::kFailed);
  calls_->fail_finish = false;
  EXPECT_NE(session_->step("cond", 1, &latents, 1).status().message().find("call begin() first"),
            std::string::npos);
  ASSERT_TRUE(session_->begin({900.0, 500.0, 100.0}, {}).ok());
  EXPECT_TRUE(session_->step("cond", 0, &latents, 1).ok());
}

TEST_F(SessionTest, ABranchThatLeftStepsOutComputesAndCachesFromThere) {
  for (const char* policy : {"interval", "motion", "signal", "probe", "follow"}) {
    TinyRun given;
    CacheSetting setting;
    setting.policy = policy;
    const NamedTensor latents{"latents", given.request.latents};
    std::vector<double> timesteps;
    for (int step = 0; step < 12; ++step) timesteps.push_back(1000.0 - 80.0 * step);
    for (const char* branch : {"cond", "uncond"}) {
      ASSERT_TRUE(session_->set_prompt(branch, given.request.prompts.at(branch)).ok());
    }
    ASSERT_TRUE(session_->begin(timesteps, setting).ok());
    const auto bytes_of = [](const Tensor& output) {
      const auto* values = output.as<float>();
      return std::vector<float>(values, values + output.shape.elements());
    };
    std::vector<float> back;
    for (std::int64_t step = 0; step < 12; ++step) {
      ASSERT_TRUE(session_->step("cond", step, &latents, 1).ok()) << policy << step;
      if (step > 0 && step < 5) continue;
      const auto output = session_->step("uncond", step, &latents, 1);
      ASSERT_TRUE(output.ok()) << policy << step << output.status().message();
      if (step == 5) back = bytes_of(*output);
    }
    const std::vector<int> alone = computed(0), interval = computed(1);
    EXPECT_EQ((std::vector<int>(interval.begin() + 1, interval.begin() + 6)),
              (std::vector<int>{-1, -1, -1, -1, 1}))
        << policy << " computes on its return";
    EXPECT_FALSE(session_->step("cond", 7, &latents, 1).ok());
    // What it gives there is what a run that begins there gives.
    const auto fresh = make();
    ASSERT_TRUE(fresh->set_prompt("uncond", given.request.prompts.at("uncond")).ok());
    ASSERT_TRUE(fresh->begin({timesteps.begin() + 5, timesteps.end()}, setting).ok());
    const auto first = fresh->step("uncond", 0, &latents, 1);
    ASSERT_TRUE(first.ok());
    EXPECT_EQ(bytes_of(*first), back) << policy;
    if (std::string(policy) == "interval") {
      EXPECT_EQ(interval, (std::vector<int>{1, -1, -1, -1, -1, 1, 1, 0, 0, 1, 0, 0}));
      EXPECT_EQ(alone, (std::vector<int>{1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0}));
    }
  }
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
            "policy 'intervall': is not in the bundle; did you mean 'interval'? known: alike, "
            "follow, interval, motion, off, probe, signal");
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

TEST_F(SessionTest, WhatIsKnownBeforeTheFirstStepIsCheckedBeforeIt) {
  const auto fault = [&](const std::function<void(RunRequest&)>& change) {
    TinyRun run(2);
    run.request.cache.policy = "off";
    change(run.request);
    const Status checked = check_run(model_->bundle(), run.request);
    EXPECT_EQ(session_->run(run.request).message(), checked.message());
    EXPECT_FALSE(checked.hint().empty()) << checked.message();
    return checked.message();
  };
  const auto expect = [&](const std::string& part, const std::function<void(RunRequest&)>& change) {
    const std::string message = fault(change);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  std::vector<float> more(2 * 2 * 4 * 4, 0.5f);
  const Tensor condition{more.data(), DType::kFloat32, Shape{1, 2, 2, 4, 4}};
  expect("the bundle takes [batch, 2,", [&](RunRequest& run) { run.condition = condition; });
  expect("input 'condition'", [&](RunRequest& run) {
    run.condition = condition;
    run.condition.shape = Shape{1, 2, 1, 4, 4};
  });
  expect("the bundle takes [batch, 2,", [](RunRequest& run) {
    run.latents.shape = Shape{1, 1, 2, 4, 4};
  });
  expect("has no table for 0 steps", [](RunRequest& run) { run.steps = 0; });
  expect("has no table for -3 steps", [](RunRequest& run) { run.steps = -3; });
  expect("guidance_scale: is not finite", [](RunRequest& run) { run.guidance_scale = NAN; });
  expect("guidance_scale: is not finite", [](RunRequest& run) { run.guidance_scale_2 = INFINITY; });
  expect("the bundle has one expert", [](RunRequest& run) { run.guidance_scale_2 = 2.0; });
  expect("flow shift", [](RunRequest& run) { run.flow_shift = NAN; });
  expect("parameter 'interval'", [](RunRequest& run) {
    run.cache.policy = "interval";
    run.cache.branches["uncond"]["interval"] = std::int64_t{0};
  });
  expect("give both prompts", [](RunRequest& run) { run.prompts.erase("uncond"); });
  EXPECT_EQ(calls_->prompt, 0);
  EXPECT_EQ(calls_->head, 0);
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

/// Makes the tiny bundle's weights those of the first of two experts; the second has its own.
void add_expert(const testing::TemporaryFolder& folder, double boundary, float scale) {
  auto manifest =
      nlohmann::json::parse(*read_text(folder.path() + "/manifest.json", 1 << 20, Code::kFailed));
  std::vector<float> weights = {1.01f * scale, 0.99f * scale, 1.02f * scale};
  Tensors tensors;
  for (std::size_t block = 0; block < 3; ++block) {
    tensors["other.blocks." + std::to_string(block) + ".weight"] = {&weights[block],
                                                                    DType::kFloat32, Shape{1}};
  }
  const std::string path = folder.path() + "/weights/other.safetensors";
  ASSERT_TRUE(write_safetensors(path, tensors).ok());
  auto written = SafetensorsFile::open(path);
  for (const auto& [name, tensor] : written->tensors) {
    manifest["tensors"][name] = {{"file", "weights/other.safetensors"},
                                 {"dtype", "float32"},
                                 {"shape", {1}},
                                 {"offset", tensor.as<std::uint8_t>() - written->file.data()},
                                 {"bytes", 4}};
  }
  manifest["files"]["weights/other.safetensors"] = {{"bytes", std::filesystem::file_size(path)},
                                                    {"sha256", std::string(64, '0')}};
  manifest["experts"] = {{{"part", "transformer"}, {"prefix", ""}, {"from_timestep", boundary}},
                         {{"part", "transformer_2"}, {"prefix", "other."}, {"from_timestep", 0.0}}};
  testing::write_manifest(folder, manifest);
}

class ExpertTest : public SessionTest {
 protected:
  /// Loads the bundle again with a second expert; its sampler's 12 timesteps are 1000, 916.7, ….
  void with_expert(double boundary, float scale) {
    add_expert(folder_, boundary, scale);
    auto model = testing::load_tiny(folder_, calls_);
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
    session_ = make();
  }
};

TEST_F(ExpertTest, EqualWeightsGiveWhatOneTransformerGives) {
  const std::vector<float> alone = run(*session_, "off");
  with_expert(800.0, 1.0f);
  EXPECT_EQ(run(*session_, "off"), alone);
  EXPECT_EQ(session_->statistics().branches.at(0).count(Decision::kComputed), 12);
}

TEST_F(ExpertTest, EachDenoisesItsOwnTimesteps) {
  TinyRun run;
  const NamedTensor latents{"latents", run.request.latents};
  const auto output_at = [&](double timestep) {
    EXPECT_TRUE(session_->begin({timestep}, CacheSetting{}).ok());
    EXPECT_TRUE(session_->set_prompt("cond", run.request.prompts["cond"]).ok());
    const auto output = session_->step("cond", 0, &latents, 1);
    EXPECT_TRUE(output.ok()) << output.status().message();
    return output->as<float>()[0];
  };
  const float high = output_at(800.0), low = output_at(799.0);
  with_expert(800.0, 1.5f);
  EXPECT_EQ(output_at(800.0), high);
  EXPECT_NE(output_at(799.0), low);
  EXPECT_NE(output_at(-1.0), output_at(0.0));  // below every boundary: still the last expert
}

TEST_F(ExpertTest, NoCacheCrossesTheSwitch) {
  with_expert(800.0, 1.5f);
  run(*session_, "interval");  // 3 timesteps are above the boundary, 9 below
  const std::vector<int> expected{1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0};
  EXPECT_EQ(computed(), expected);
  with_expert(700.0, 1.5f);
  const std::vector<float> fresh = run(*session_, "interval");
  EXPECT_EQ(computed(), (std::vector<int>{1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0}));
  run(*session_, "motion");
  EXPECT_EQ(computed(), (std::vector<int>{1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(run(*session_, "interval"), fresh);
}

TEST_F(ExpertTest, GuidanceChangesWithTheExpert) {
  with_expert(700.0, 1.5f);
  TinyRun same, other;
  same.request.guidance_scale_2 = 2.0;
  other.request.guidance_scale_2 = 4.0;
  const std::vector<float> plain = run(*session_, "off");
  same.request.cache.policy = other.request.cache.policy = "off";
  ASSERT_TRUE(session_->run(same.request).ok());
  ASSERT_TRUE(session_->run(other.request).ok());
  EXPECT_EQ(same.latents, plain);
  EXPECT_NE(other.latents, plain);
  other.request.guidance_scale_2 = std::nan("");
  EXPECT_EQ(session_->run(other.request).code(), Code::kRequest);
}

TEST_F(ExpertTest, StepsFollowOverTheSwitch) {
  with_expert(700.0, 1.5f);
  TinyRun run;
  const NamedTensor latents{"latents", run.request.latents};
  ASSERT_TRUE(session_->begin({1000, 900, 600, 500}, CacheSetting{}).ok());
  ASSERT_TRUE(session_->set_prompt("cond", run.request.prompts["cond"]).ok());
  EXPECT_TRUE(session_->prepare(&latents, 1).ok());
  EXPECT_FALSE(session_->step("cond", 2, &latents, 1).ok());
  for (std::int64_t step = 0; step < 4; ++step) {
    EXPECT_TRUE(session_->step("cond", step, &latents, 1).ok()) << step;
    EXPECT_FALSE(session_->step("cond", step, &latents, 1).ok()) << step;
  }
  EXPECT_FALSE(session_->step("cond", 4, &latents, 1).ok());
  const Status status = session_->begin({1000, 600, 900}, CacheSetting{});
  EXPECT_EQ(status.code(), Code::kRequest);
  EXPECT_NE(status.message().find("falling"), std::string::npos);
}

TEST_F(SessionTest, ABranchMayHaveParametersOfItsOwn) {
  TinyRun run;
  run.request.cache.policy = "interval";
  run.request.cache.branches["uncond"]["interval"] = std::int64_t{2};
  ASSERT_TRUE(session_->run(run.request).ok());
  EXPECT_EQ(computed(0), (std::vector<int>{1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0}));
  EXPECT_EQ(computed(1), (std::vector<int>{1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0}));
  run.request.cache.branches["uncond"]["interval"] = std::int64_t{0};
  EXPECT_EQ(session_->run(run.request).code(), Code::kConfig);
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

}  // namespace
}  // namespace freewheel

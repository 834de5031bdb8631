// SPDX-License-Identifier: Apache-2.0
#include "progress.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

namespace freewheel::triton {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

TEST(StepProgressTest, SpellsBothBranchesAndForgetsThem) {
  StepProgress progress;
  progress.add({"cond", 3, 10, true, kNone, 0.5});
  progress.add({"uncond", 3, 10, false, 0.25, 0.125});
  SampleEvent event;
  event.step_index = 3;
  event.steps = 10;
  const auto step = nlohmann::json::parse(progress.take(event, 2.0));
  EXPECT_EQ(step["event"], "step");
  EXPECT_EQ(step["step_index"], 3);
  EXPECT_EQ(step["branches"]["cond"]["decision"], "compute");
  EXPECT_TRUE(step["branches"]["cond"]["distance"].is_null());
  EXPECT_EQ(step["branches"]["uncond"]["decision"], "reuse");
  EXPECT_EQ(step["branches"]["uncond"]["distance"], 0.25);
  EXPECT_TRUE(nlohmann::json::parse(progress.take(event, 3.0))["branches"].empty());
}

TEST(SummaryTest, CountsStepsOfEachBranch) {
  RunStatistics run;
  run.policy = "teacache";
  run.steps = 4;
  BranchStatistics branch;
  branch.name = "cond";
  branch.decisions = {Decision::kComputed, Decision::kReused, Decision::kReused,
                      Decision::kSkipped};
  branch.distance = {kNone, 0.1, 0.2, kNone};
  branch.seconds = {1.0, 0.5, 0.5, 0.0};
  run.branches.push_back(branch);
  const auto summary = nlohmann::json::parse(summary_json(run, 7, 2.5));
  EXPECT_EQ(summary["event"], "done");
  EXPECT_EQ(summary["seed"], 7);
  EXPECT_EQ(summary["branches"]["cond"]["computed_steps"], 1);
  EXPECT_EQ(summary["branches"]["cond"]["reused_steps"], 2);
  EXPECT_TRUE(nlohmann::json::parse(summary_json(run, std::nullopt, 2.5))["seed"].is_null());
}

}  // namespace
}  // namespace freewheel::triton

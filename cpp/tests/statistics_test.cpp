// SPDX-License-Identifier: Apache-2.0
#include "freewheel/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace freewheel {
namespace {

constexpr Decision kReused = Decision::kReused, kComputed = Decision::kComputed;
constexpr Decision kSkipped = Decision::kSkipped;

RunStatistics sample() {
  RunStatistics run;
  run.policy = "teacache";
  run.steps = 20;
  run.depth = 1;
  run.branches.push_back({"cond",
                          {kComputed, kReused, kReused, kComputed},
                          {0, 0.1, 0.2, 0},
                          {0, 1, 1, 0},
                          {4, 1, 1, 4},
                          1});
  return run;
}

TEST(Percentile, InterpolatesAsNumPyDoes) {
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 25), 1.75);
  EXPECT_DOUBLE_EQ(percentile({3}, 50), 3);
  EXPECT_TRUE(std::isnan(percentile({}, 50)));
}

TEST(RunStatistics, SpeedupsAreRatios) {
  EXPECT_DOUBLE_EQ(sample().ideal_speedup(), 2.0);
  EXPECT_DOUBLE_EQ(sample().estimated_speedup(), 1.6);
  EXPECT_DOUBLE_EQ(RunStatistics().ideal_speedup(), 1.0);
}

TEST(RunStatistics, JsonHoldsWhatPythonPrints) {
  const auto found = nlohmann::json::parse(sample().json());
  EXPECT_EQ(found["branches"]["cond"]["computed"], nlohmann::json({true, false, false, true}));
  EXPECT_EQ(found["branches"]["cond"]["mix"][0], nlohmann::json::array());
  EXPECT_EQ(found["branches"]["cond"]["mix"][1], nlohmann::json({1.0}));
  EXPECT_DOUBLE_EQ(found["branches"]["cond"]["percentiles"]["max"], 0.2);
  EXPECT_EQ(found["computed_steps"], 2);
  EXPECT_TRUE(found["computed_steps"].is_number_integer());
  EXPECT_DOUBLE_EQ(found["estimated_speedup"], 1.6);
  EXPECT_FALSE(found.contains("measured_speedup"));
  EXPECT_TRUE(found["warnings"].empty());
}

TEST(RunStatistics, ASkippedStepCountsForNothing) {
  RunStatistics run;
  run.policy = "teacache";
  run.steps = 20;
  run.branches.push_back({"uncond",
                          {kComputed, kSkipped, kSkipped, kReused},
                          {0, NAN, NAN, 0.2},
                          {0, 0, 0, 1},
                          {4, 0, 0, 1},
                          1});
  EXPECT_DOUBLE_EQ(run.ideal_speedup(), 2.0);
  EXPECT_DOUBLE_EQ(run.estimated_speedup(), 1.6);
  const auto found = nlohmann::json::parse(run.json())["branches"]["uncond"];
  EXPECT_EQ(found["computed"], nlohmann::json({true, nullptr, nullptr, false}));
  EXPECT_EQ(found["distance"], nlohmann::json({0.0, nullptr, nullptr, 0.2}));
  EXPECT_EQ(found["mix"].dump(), "[[],[],[],[1.0]]");
  EXPECT_DOUBLE_EQ(found["percentiles"]["min"], 0.2);
  run.branches[0].decisions[3] = kSkipped;
  EXPECT_EQ(nlohmann::json::parse(run.json())["warnings"].size(), 1u);
}

TEST(RunStatistics, AnUncachedRunHasNoSpeedup) {
  RunStatistics run = sample();
  run.policy = "off";
  EXPECT_TRUE(nlohmann::json::parse(run.json())["estimated_speedup"].is_null());
}

TEST(RunStatistics, APolicyThatReusesNothingIsWarnedAbout) {
  RunStatistics run = sample();
  run.branches[0].decisions.assign(4, kComputed);
  run.branches[0].distance[1] = NAN;
  const auto found = nlohmann::json::parse(run.json());
  ASSERT_EQ(found["warnings"].size(), 1u);
  EXPECT_TRUE(found["branches"]["cond"]["distance"][1].is_null());
}

TEST(RunStatistics, OneCauseIsOneWarning) {
  RunStatistics run = sample();
  run.branches[0].decisions.assign(4, kComputed);
  run.branches.push_back(run.branches[0]);
  run.branches[1].name = "uncond";
  auto warnings = nlohmann::json::parse(run.json())["warnings"];
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].get<std::string>().find("in branch 'cond' and 'uncond': every step"),
            std::string::npos);
  run.steps = 4;
  warnings = nlohmann::json::parse(run.json())["warnings"];
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].get<std::string>().find("4 steps is few-step sampling"), std::string::npos);
  EXPECT_NE(warnings[0].get<std::string>().find("reused nothing"), std::string::npos);
}

}  // namespace
}  // namespace freewheel

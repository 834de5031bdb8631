// SPDX-License-Identifier: Apache-2.0
#include "freewheel/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace freewheel {
namespace {

RunStatistics sample() {
  RunStatistics run;
  run.policy = "teacache";
  run.steps = 4;
  run.depth = 1;
  run.branches.push_back({"cond", {1, 0, 0, 1}, {0, 0.1, 0.2, 0}, {0, 1, 1, 0}, {4, 1, 1, 4}, 1});
  return run;
}

TEST(Percentile, InterpolatesAsNumPyDoes) {
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 25), 1.75);
  EXPECT_DOUBLE_EQ(percentile({3}, 50), 3);
  EXPECT_TRUE(std::isnan(percentile({}, 50)));
}

TEST(RunStatistics, SpeedupsAreRatios) {
  EXPECT_DOUBLE_EQ(sample().ideal_speedup(), 2.0);
  EXPECT_DOUBLE_EQ(sample().measured_speedup(), 1.6);
  EXPECT_DOUBLE_EQ(RunStatistics().ideal_speedup(), 1.0);
}

TEST(RunStatistics, JsonHoldsWhatPythonPrints) {
  const auto found = nlohmann::json::parse(sample().json());
  EXPECT_EQ(found["branches"]["cond"]["computed"], nlohmann::json({true, false, false, true}));
  EXPECT_EQ(found["branches"]["cond"]["mix"][0], nlohmann::json::array());
  EXPECT_EQ(found["branches"]["cond"]["mix"][1], nlohmann::json({1.0}));
  EXPECT_DOUBLE_EQ(found["branches"]["cond"]["percentiles"]["max"], 0.2);
  EXPECT_EQ(found["computed_steps"], 2.0);
  EXPECT_TRUE(found["warnings"].empty());
}

TEST(RunStatistics, APolicyThatReusesNothingIsWarnedAbout) {
  RunStatistics run = sample();
  run.branches[0].computed = {1, 1, 1, 1};
  run.branches[0].distance[1] = NAN;
  const auto found = nlohmann::json::parse(run.json());
  ASSERT_EQ(found["warnings"].size(), 1u);
  EXPECT_TRUE(found["branches"]["cond"]["distance"][1].is_null());
}

}  // namespace
}  // namespace freewheel

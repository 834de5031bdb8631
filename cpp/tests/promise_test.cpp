// SPDX-License-Identifier: Apache-2.0
#include "promise.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

CacheSetting bounded(double bound) {
  CacheSetting setting;
  setting.policy = "solved";
  setting.parameters["budgets"] = std::vector<std::int64_t>{5, 8, 12};
  setting.parameters["computed_steps"] = std::int64_t{12};
  setting.promise = Promise{0.9, 20, {31.0, 40.0, 55.0}};
  setting.min_psnr = bound;
  return setting;
}

TEST(Promise, TakesTheFewestComputedStepsThatKeepTheBound) {
  for (const auto& [bound, count] : {std::pair{30.0, 5}, {31.0, 5}, {31.1, 8}, {55.0, 12}}) {
    CacheSetting setting = bounded(bound);
    ASSERT_TRUE(keep_bound(setting).ok());
    EXPECT_EQ(setting.parameters["computed_steps"], Value(std::int64_t{count}));
  }
}

TEST(Promise, RefusesWhatNothingKeeps) {
  CacheSetting high = bounded(56.0), hurried = bounded(40.0), untold = bounded(40.0);
  hurried.deadline = 3.0;
  untold.promise.reset();
  EXPECT_EQ(keep_bound(high).message(),
            "min_psnr 56: is kept by no number of computed steps: 90 of 100 runs keep 55.0 dB at "
            "most; ask for less, or run uncached");
  EXPECT_EQ(keep_bound(hurried).hint(), "give one of the two");
  EXPECT_NE(keep_bound(untold).hint().find("--hold-out 20"), std::string::npos);
}

TEST(Promise, HoldsForTheRunsThatItWasMeasuredOn) {
  const CacheSetting setting = bounded(40.0);
  EXPECT_TRUE(check_bound_steps(setting, Stretch{"solved", 20, 0, 20}).ok());
  EXPECT_EQ(check_bound_steps(setting, Stretch{"solved", 20, 0, 30}).where(), "min_psnr 40");
  EXPECT_NE(check_bound_steps(setting, Stretch{"solved", 20, 5, 15}).message().find("at step 5"),
            std::string::npos);
  GenerationDefaults made, asked;
  EXPECT_TRUE(check_bound_values(setting, made, asked).ok());
  asked.guidance_scale = made.guidance_scale + 1.0;
  EXPECT_NE(check_bound_values(setting, made, asked).message().find("guidance_scale"),
            std::string::npos);
}

}  // namespace
}  // namespace freewheel

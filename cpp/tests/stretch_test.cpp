// SPDX-License-Identifier: Apache-2.0
#include "stretch.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

/// A run whose noise level falls evenly from one.
Schedule even(double from, std::int64_t steps) {
  Schedule schedule;
  for (std::int64_t step = 0; step < steps; ++step) {
    schedule.sigmas.push_back(from *
                              (1.0 - static_cast<double>(step) / static_cast<double>(steps)));
    schedule.timesteps.push_back(kTrainTimesteps * schedule.sigmas.back());
  }
  return schedule;
}

CacheSetting solved() {
  CacheSetting setting;
  setting.policy = "solved";
  setting.parameters["steps"] = std::int64_t{20};
  setting.parameters["sigmas"] = even(1.0, 20).sigmas;
  return setting;
}

TEST(Stretch, SettingsWithoutTablesAreStretchedNowhere) {
  EXPECT_FALSE(Stretch::of({}, even(1.0, 30)));
}

TEST(Stretch, TheDistanceIsTold) {
  CacheSetting of_branch;
  of_branch.policy = "magcache";
  of_branch.branches["cond"]["steps"] = std::int64_t{20};
  for (const CacheSetting& setting : {solved(), of_branch}) {
    EXPECT_TRUE(Stretch::of(setting, even(1.0, 20))->is_whole());
    EXPECT_TRUE(Stretch::of(setting, even(1.0, 20))->warnings().empty());
    EXPECT_EQ(Stretch::of(setting, even(1.0, 40))->warnings().at(0),
              "the tables of '" + setting.policy +
                  "' were made for 20 steps and are stretched from 20 to 40, 100% away: expect "
                  "somewhat less quality");
    for (const std::int64_t steps : {18, 41}) {
      const std::string far = Stretch::of(setting, even(1.0, steps))->warnings().at(0);
      EXPECT_NE(far.find("away: calibrate again with --steps"), std::string::npos);
    }
  }
}

TEST(Stretch, ARunInTheMidstIsComparedWithTheStepsFromThereOn) {
  const auto rest = Stretch::of(solved(), even(0.5, 10));
  EXPECT_EQ(rest->first, 10);
  EXPECT_TRUE(rest->warnings().empty());
  EXPECT_FALSE(rest->is_whole());
  EXPECT_NE(Stretch::of(solved(), even(0.5, 5))
                ->warnings()
                .at(0)
                .find("of which the run begins at step 10, and are stretched from 10 to 5, 50%"),
            std::string::npos);
}

}  // namespace
}  // namespace freewheel

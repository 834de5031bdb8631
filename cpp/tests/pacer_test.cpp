// SPDX-License-Identifier: Apache-2.0
#include "pacer.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

/// Runs steps of these seconds, all computed or all reused, and returns when they end.
double run(Pacer& pacer, double now, std::initializer_list<double> seconds, bool computed) {
  for (const double taken : seconds) {
    pacer.begin_step(now, 0.0);
    pacer.note(computed);
    now += taken;
  }
  return now;
}

TEST(Pacer, WithoutADeadlineNothingIsHurried) {
  Pacer pacer;
  pacer.begin({}, 5.0);
  const double now = run(pacer, 5.0, {1.0, 1.0}, true);
  const Pace pace = pacer.begin_step(now, 0.0);
  EXPECT_EQ(pace.seconds_left, Pace::kNoDeadline);
  EXPECT_EQ(pace.computed_seconds, 0.0);
}

TEST(Pacer, TellsMeansAndHoldsTheSlowestStepInReserve) {
  Pacer pacer;
  pacer.begin(20.0, 100.0);
  double now = run(pacer, 100.0, {1.0, 1.0, 3.0, 2.0}, true);
  now = run(pacer, now, {0.5, 0.25}, false);
  const Pace pace = pacer.begin_step(now, 0.0);
  EXPECT_DOUBLE_EQ(pace.computed_seconds, 1.75);
  EXPECT_DOUBLE_EQ(pace.reused_seconds, 0.375);
  EXPECT_DOUBLE_EQ(pace.seconds_left, 20.0 - 7.75 - 1.25);
  EXPECT_DOUBLE_EQ(pacer.taken(now), 7.75);
}

TEST(Pacer, RemembersTheLastStepsAcrossRuns) {
  Pacer pacer;
  pacer.begin(100.0, 0.0);
  double now = run(pacer, 0.0, {9.0, 9.0}, true);
  for (int step = 0; step < 24; ++step) now = run(pacer, now, {1.0}, true);
  pacer.begin(100.0, now + 8.0);  // the slow ones are old, and remembered
  const Pace pace = pacer.begin_step(now + 8.0, 0.0);
  EXPECT_DOUBLE_EQ(pace.computed_seconds, 41.0 / 25.0);  // the last step was not ended
  EXPECT_DOUBLE_EQ(pace.seconds_left, 100.0);  // the slowest of the newest is below the mean
  now = run(pacer, now + 8.0, {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}, true);
  pacer.begin_step(now, 0.0);
  pacer.begin(10.0, now);
  EXPECT_DOUBLE_EQ(pacer.begin_step(now, 0.0).computed_seconds, 1.0);
  EXPECT_DOUBLE_EQ(pacer.begin_step(now, 0.0).seconds_left, 10.0);
  pacer.forget();
  EXPECT_DOUBLE_EQ(pacer.begin_step(now, 0.0).computed_seconds, 0.0);
}

TEST(Pacer, KeepsSecondsPerBranch) {
  Pacer pacer;
  pacer.begin(100.0, 0.0);
  const double now = run(pacer, 0.0, {1.0}, true);
  EXPECT_DOUBLE_EQ(pacer.begin_step(now, 0.0).computed_seconds, 1.0);
  pacer.begin(100.0, now);
  pacer.begin_step(now, 0.0);
  pacer.note(true);
  pacer.note(true);
  EXPECT_DOUBLE_EQ(pacer.begin_step(now + 4.0, 0.0).computed_seconds, 3.0);  // of 1 and 2 a branch
}

TEST(Pacer, AComputedStepTakesAReusedOnesSecondsAtLeast) {
  Pacer pacer;
  pacer.begin(100.0, 0.0);
  const double now = run(pacer, run(pacer, 0.0, {1.0}, true), {3.0}, false);
  const Pace pace = pacer.begin_step(now, 0.0);
  EXPECT_DOUBLE_EQ(pace.computed_seconds, 3.0);
  EXPECT_DOUBLE_EQ(pace.reused_seconds, 3.0);
}

TEST(Pacer, LeavesOutWhatNoLaterStepTakesAgain) {
  Pacer pacer;
  pacer.begin(10.0, 0.0);
  pacer.begin_step(0.0, 0.0);
  pacer.note(true);
  pacer.note(false);  // another branch of the same step
  const Pace pace = pacer.begin_step(4.0, 3.0);
  EXPECT_DOUBLE_EQ(pace.computed_seconds, 1.0);  // of both
  EXPECT_DOUBLE_EQ(pace.seconds_left, 6.0);
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "signal_buffers.h"

#include <gtest/gtest.h>

#include <set>

namespace freewheel {
namespace {

TEST(SignalBuffers, RolesFollowTheSignals) {
  constexpr int kNone = 0, kComputed = 1, kOlder = 2;
  for (const bool keeps_previous : {false, true}) {
    for (const int keeps : {kNone, kComputed, kOlder}) {
      const bool keeps_computed = keeps >= kComputed, keeps_older = keeps == kOlder;
      SignalBuffers roles(keeps_previous, keeps_computed, keeps_older);
      std::vector<int> written(roles.count(), -1);  // the step whose signal a buffer holds
      int last_computed = -1, older = -1;
      std::set<std::size_t> known;
      for (const auto& stand : roles.stands()) known.insert(SignalBuffers::key(stand));
      EXPECT_EQ(known.size(), roles.stands().size()) << "keys tell stands apart";
      for (int step = 0; step < 40; ++step) {
        const std::size_t spot = roles.advance();
        ASSERT_LT(spot, written.size());
        written[spot] = step;
        const auto& stand = roles.stand();
        EXPECT_EQ(static_cast<std::size_t>(stand.current), spot);
        EXPECT_EQ(known.count(SignalBuffers::key(stand)), 1u);
        if (keeps_previous && step > 0) {
          EXPECT_EQ(written[static_cast<std::size_t>(stand.previous)], step - 1);
        }
        if (keeps_computed && last_computed >= 0) {
          EXPECT_EQ(written[static_cast<std::size_t>(stand.computed)], last_computed);
        }
        if (keeps_older && older >= 0) {
          EXPECT_EQ(written[static_cast<std::size_t>(stand.older)], older);
        }
        if (step % 3 != 0 && step % 7 != 1) continue;
        roles.mark_computed();
        older = last_computed;
        last_computed = step;
      }
    }
  }
}

}  // namespace
}  // namespace freewheel

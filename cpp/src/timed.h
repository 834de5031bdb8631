// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Seconds of a scope, added to a segment's.

#include <chrono>

#include "freewheel/statistics.h"

namespace freewheel {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point began) noexcept {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

inline double seconds_now() noexcept {
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

/// Adds the seconds of its life to a segment of `statistics`.
class Timed {
 public:
  Timed(RunStatistics& statistics, Segment segment) noexcept
      : total_(statistics.seconds[static_cast<std::size_t>(segment)]), began_(Clock::now()) {}
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;
  ~Timed() { total_ += seconds_since(began_); }

 private:
  double& total_;
  Clock::time_point began_;
};

}  // namespace freewheel

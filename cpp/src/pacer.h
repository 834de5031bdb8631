// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Measures a run's steps, and tells its policy how it stands against its deadline.

#include <array>
#include <cstddef>
#include <optional>

namespace freewheel {

/// What decide graphs are told of time before one step, by these names.
struct Pace {
  double seconds_left = kNoDeadline;
  double computed_seconds = 0.0;  ///< Of a computed step; 0 where none was measured.
  double reused_seconds = 0.0;

  /// Seconds left of a run without a deadline, as `policies/deadline.py` has them.
  static constexpr double kNoDeadline = 1e30;
};

/// Seconds of the last computed and reused steps, of this run and those before it; kept per branch,
/// since the run before may have had one and this one two. Times are given, so that any clock will
/// do; nothing is allocated.
class Pacer {
 public:
  /// Starts a run that may take `deadline` seconds, if given.
  void begin(std::optional<double> deadline, double now) noexcept;

  /// Forgets how long steps take: they become others.
  void forget() noexcept { computed_ = reused_ = {}; }

  /// Ends the step before, and tells how the run stands before the next. What the slowest of the
  /// newest computed steps took longer than the mean is held in reserve. A computed step takes a
  /// reused one's seconds at least: on a busy machine the means of a few may say otherwise.
  /// @param prepared Seconds of this run that no later step takes again, such as allocations.
  Pace begin_step(double now, double prepared) noexcept;

  /// Says what a branch does in the step that began last; the first one's is the step's.
  void note(bool computed) noexcept;

  double taken(double now) const noexcept { return now - began_; }

 private:
  /// The last of them, in a ring: enough to hold a busy machine's spells and its rests.
  struct Window {
    static constexpr std::size_t kNewest = 8;
    std::array<double, 32> seconds{};
    std::size_t count = 0;

    void add(double value) noexcept { seconds[count++ % seconds.size()] = value; }
    std::size_t held() const noexcept { return count < seconds.size() ? count : seconds.size(); }
    double mean() const noexcept;
    double most_of_newest() const noexcept;
  };

  Window computed_, reused_;
  std::optional<double> deadline_;
  double began_ = 0.0, step_began_ = 0.0;
  std::optional<bool> was_computed_;
  int noted_ = 0, branches_ = 1;  ///< Branches of this step so far, and of the one before.
};

}  // namespace freewheel

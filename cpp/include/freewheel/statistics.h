// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a run did: decisions, distances and seconds.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace freewheel {

/// Parts of a run that seconds are counted for.
enum class Segment : std::uint8_t {
  kPrepare,
  kPrompt,
  kHead,
  kDecide,
  kBody,
  kReuse,
  kFinish,
  kSampler
};
inline constexpr int kSegments = 8;
const char* segment_name(Segment segment) noexcept;

/// What a branch did at a step; `kSkipped`: it did not run, as in a guidance interval.
enum class Decision : std::uint8_t { kReused, kComputed, kSkipped };

/// One branch, with an entry for every step of the run. `distance` is NaN where the policy has none
/// and at skipped steps; `mix` holds `depth` factors per step, newest residual first, all 0 but on
/// reused steps.
struct BranchStatistics {
  std::string name;
  std::vector<Decision> decisions;
  std::vector<double> distance;
  std::vector<float> mix;
  std::vector<double> seconds;
  std::int64_t depth = 0;

  std::int64_t count(Decision decision) const noexcept;
};

/// One run of a session.
struct RunStatistics {
  std::string policy = "off";
  bool is_folded = true;
  std::int64_t steps = 0;
  std::int64_t depth = 0;
  double always_run = 0.0;  ///< Part of the blocks that reused steps run too, 0 to below 1.
  std::vector<BranchStatistics> branches;
  std::array<double, kSegments> seconds{};
  std::optional<double> deadline;     ///< Seconds that the steps were to take.
  double loop_seconds = 0.0;          ///< From the run's begin to the end of its last step so far.
  std::vector<std::string> warnings;  ///< Of the request; `json` adds those of the run.

  /// Steps that ran / those that their blocks would be enough for, over all branches, as if all
  /// else were free.
  double ideal_speedup() const noexcept;

  /// Estimate: median seconds of a computed step for every step that ran / their seconds; no
  /// uncached run is timed. 0 where every step is computed by wish ("off") or none was.
  double estimated_speedup() const;

  /// The object that `freewheel run --json` prints.
  std::string json() const;
};

/// The q-th percentile (0 to 100) with linear interpolation; NaN of nothing.
double percentile(std::vector<double> values, double q);

}  // namespace freewheel

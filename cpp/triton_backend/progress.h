// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The JSON of a response's `progress` output; docs/how-to/serve.md lists its fields.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "freewheel/session.h"
#include "freewheel/statistics.h"

namespace freewheel::triton {

/// Collects the events of one step, both branches.
class StepProgress {
 public:
  void add(const BranchEvent& event);

  /// Spells the step and forgets it. @param elapsed Seconds since the run began.
  std::string take(const SampleEvent& event, double elapsed);

 private:
  struct Branch {
    std::string name;
    bool computed;
    double distance, seconds;
  };
  std::vector<Branch> branches_;
};

/// Spells the summary of a run that ended.
std::string summary_json(const RunStatistics& run, std::optional<std::uint64_t> seed,
                         double seconds);

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// How far a run is from the one that its setting's tables were made for, as in
/// `policies/stretch.py`.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "freewheel/manifest.h"
#include "schedule.h"

namespace freewheel {

/// A run over tables of a policy that has an entry for every step of the run they were made from.
struct Stretch {
  std::string policy;      ///< Whose tables they are.
  std::int64_t made = 0;   ///< Steps that they were made for.
  std::int64_t first = 0;  ///< Step of these that the run begins at.
  std::int64_t steps = 0;  ///< Steps of the run.

  /// How a run of at least one step lies over a setting's tables; nothing where it has none.
  static std::optional<Stretch> of(const CacheSetting& setting, const Schedule& schedule);

  /// Whether the run has the steps that the tables were made for, from the first one on.
  bool is_whole() const noexcept { return first == 0 && steps == made; }

  /// How far the run is from the tables; nothing where every step has an entry of its own.
  std::vector<std::string> warnings() const;
};

}  // namespace freewheel

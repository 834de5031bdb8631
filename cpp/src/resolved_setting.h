// SPDX-License-Identifier: Apache-2.0
#pragma once

/// A cache setting against a bundle: which signal the policy gets, whether it folds, how many
/// residuals it mixes.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "freewheel/manifest.h"
#include "sections.h"

namespace freewheel {

/// A cache setting checked against the bundle. Points into the bundle's manifest.
struct ResolvedSetting {
  CacheSetting setting;
  const PolicyEntry* policy = nullptr;
  std::map<std::string, std::vector<double>> parameters;
  const SignalEntry* signal = nullptr;
  /// Where the body divides, if the signal is what its first blocks add.
  std::optional<Sections> sections;

  /// Resolves a setting for branches that have no overrides of their own.
  static Result<ResolvedSetting> create(const Manifest& manifest, const CacheSetting& setting);

  /// As `create`, and checks what the setting becomes in every branch.
  static Result<ResolvedSetting> for_all_branches(const Manifest& manifest,
                                                  const CacheSetting& setting);

  /// Whether decisions depend on timesteps alone, and so can be taken ahead of the loop.
  bool is_folded() const noexcept {
    return !setting.deadline && !policy->spec.wants_feature && !policy->spec.keeps_gram &&
           (signal == nullptr || signal->is_known_per_run);
  }

  /// Part of the body that a reused step runs, 0 to below 1.
  double always_run() const noexcept { return sections ? sections->always_run() : 0.0; }

  /// Residuals that the policy mixes.
  std::int64_t depth() const;
};

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// A request's bound on quality: which number of computed steps keeps it.

#include <optional>

#include "freewheel/manifest.h"
#include "stretch.h"

namespace freewheel {

/// Where a setting has a bound, sets `computed_steps` to the fewest that keep it; refuses one that
/// nothing keeps, or that stands beside a deadline. The rules are those of `policies/promise.py`.
Status keep_bound(CacheSetting& setting);

/// Refuses a run of other steps than those that a bound's quality was measured at.
/// @param stretch Of the run over the setting's tables.
Status check_bound_steps(const CacheSetting& setting, const std::optional<Stretch>& stretch);

/// Refuses a run of another size, guidance, shift or sampler than those of the setting's config.
Status check_bound_values(const CacheSetting& setting, const GenerationDefaults& made,
                          const GenerationDefaults& asked);

}  // namespace freewheel

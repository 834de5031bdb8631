// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a request names: a config or policy of the bundle, and overrides of it.

#include <string>
#include <vector>

#include "freewheel/manifest.h"

namespace freewheel {

/// Finds a config by name, or what a policy runs with by its name; empty takes the default config.
Result<ConfigEntry> find_config(const Manifest& manifest, const std::string& name);

/// Finds a policy that the bundle carries.
Result<const PolicyEntry*> carried_policy(const Manifest& manifest, const std::string& name);

/// Applies overrides; reports all that are wrong in one status.
/// @param also_known As for `apply_override`.
Status apply_overrides(const Manifest& manifest, const Overrides& overrides,
                       const std::vector<std::string>& also_known, CacheSetting& setting);

/// JSON of what a bundle offers: policies with their parameters, configs, inputs, samplers.
std::string describe(const Manifest& manifest, const std::string& backend);

}  // namespace freewheel

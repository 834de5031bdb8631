// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Policies and configs as a manifest spells them. Faults go to the reader.

#include <string>

#include "field_reader.h"
#include "freewheel/manifest.h"

namespace freewheel {

PolicySpec read_policy_spec(FieldReader& reader, const nlohmann::json& entry,
                            const std::string& path);
CacheSetting read_setting(FieldReader& reader, const nlohmann::json& entry,
                          const std::string& path);
ConfigEntry read_config(FieldReader& reader, const nlohmann::json& entry, const std::string& path);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// JSON in and out of our types; the only private header that knows the JSON library.

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "freewheel/policy_spec.h"
#include "freewheel/status.h"

namespace freewheel {

/// Parses text strictly: no key twice in one object, nesting at most 64.
Result<nlohmann::json> parse_json(const std::string& text, const std::string& where,
                                  const std::string& hint);

/// Reads a parameter's value; nothing for objects, null and lists of anything but numbers.
std::optional<Value> value_from_json(const nlohmann::json& json);

nlohmann::json json_from_value(const Value& value);

}  // namespace freewheel

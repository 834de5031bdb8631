// SPDX-License-Identifier: Apache-2.0
#include "stretch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <variant>

namespace freewheel {
namespace {

/// How many times the steps of its tables a run may have before they are no longer to be trusted.
constexpr std::int64_t kLongest = 2;

using Parameters = std::map<std::string, Value>;

/// A parameter of that type, of the setting or else of the first branch that has one.
template <typename T>
const T* find(const CacheSetting& setting, const std::string& name) {
  std::vector<const Parameters*> tables = {&setting.parameters};
  for (const auto& entry : setting.branches) tables.push_back(&entry.second);
  for (const Parameters* table : tables) {
    const auto entry = table->find(name);
    if (entry == table->end()) continue;
    if (const T* value = std::get_if<T>(&entry->second)) return value;
  }
  return nullptr;
}

}  // namespace

std::optional<Stretch> Stretch::of(const CacheSetting& setting, const Schedule& schedule) {
  const auto* made = find<std::int64_t>(setting, "steps");
  if (made == nullptr) return std::nullopt;
  Stretch found{setting.policy, *made, 0, schedule.steps()};
  if (const auto* levels = find<std::vector<double>>(setting, "sigmas")) {
    const auto nearest =
        std::min_element(levels->begin(), levels->end(), [&](double one, double other) {
          return std::abs(one - schedule.sigmas.front()) <
                 std::abs(other - schedule.sigmas.front());
        });
    found.first = std::min<std::int64_t>(nearest - levels->begin(), *made - 1);
  }
  return found;
}

std::vector<std::string> Stretch::warnings() const {
  const std::int64_t rest = made - first;
  if (steps == rest) return {};
  const double far = static_cast<double>(std::abs(steps - rest)) /
                     static_cast<double>(std::max<std::int64_t>(rest, 1));
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.0f%%", 100.0 * far);
  const std::string begins =
      first > 0 ? ", of which the run begins at step " + std::to_string(first) + "," : "";
  const bool is_near = steps > rest && steps <= kLongest * rest;
  return {"the tables of '" + policy + "' were made for " + std::to_string(made) + " steps" +
          begins + " and are stretched from " + std::to_string(rest) + " to " +
          std::to_string(steps) + ", " + percent +
          " away: " + (is_near ? "expect somewhat less quality" : "calibrate again with --steps")};
}

}  // namespace freewheel

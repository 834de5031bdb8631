// SPDX-License-Identifier: Apache-2.0
#include "resolved_setting.h"

#include <algorithm>

#include "freewheel/settings.h"
#include "try.h"

namespace freewheel {

Result<ResolvedSetting> ResolvedSetting::create(const Manifest& manifest,
                                                const CacheSetting& setting) {
  ResolvedSetting resolved;
  resolved.setting = setting;
  FREEWHEEL_ASSIGN(resolved.policy, carried_policy(manifest, setting.policy));
  const PolicySpec& spec = resolved.policy->spec;
  std::optional<std::string> name = setting.signal;
  std::vector<std::string> known;
  for (const std::string& signal : spec.signals) {
    if (manifest.signals.count(signal) != 0) known.push_back(signal);
  }
  if (!name && !spec.signals.empty()) name = known.empty() ? spec.signals.front() : known.front();
  if (name) {
    if (std::find(known.begin(), known.end(), *name) == known.end()) {
      return Status(Code::kConfig, "signal '" + *name + "'",
                    "can't be given to policy '" + setting.policy + "' on this model",
                    nearest(*name, known));
    }
    resolved.signal = &manifest.signals.at(*name);
  }
  FREEWHEEL_ASSIGN(resolved.parameters, spec.resolve(setting.parameters));
  return resolved;
}

Result<ResolvedSetting> ResolvedSetting::for_all_branches(const Manifest& manifest,
                                                          const CacheSetting& setting) {
  for (const auto& [branch, overrides] : setting.branches) {
    const auto own = create(manifest, setting.for_branch(branch));
    if (!own.ok()) return own.status();
  }
  return create(manifest, setting);
}

std::int64_t ResolvedSetting::depth() const {
  const HistorySpec& history = policy->spec.history;
  if (!history.parameter) return history.depth;
  const auto chosen = static_cast<std::int64_t>(parameters.at(*history.parameter).front());
  return std::clamp<std::int64_t>(chosen + history.offset, 0, history.maximum);
}

}  // namespace freewheel

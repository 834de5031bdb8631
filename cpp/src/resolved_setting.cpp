// SPDX-License-Identifier: Apache-2.0
#include "resolved_setting.h"

#include <algorithm>

#include "freewheel/settings.h"
#include "promise.h"
#include "try.h"

namespace freewheel {
namespace {

/// Refuses a deadline where no policy looks at it, or two transformers would each have it.
Status check_deadline(const Manifest& manifest, const PolicyEntry& policy) {
  const std::string where = "deadline of policy '" + policy.spec.name + "'";
  if (manifest.graphs.at(policy.graph).inputs.count("seconds_left") == 0) {
    return Status(Code::kConfig, where,
                  "can't be kept: the policy does not choose its computed steps by the time left",
                  "take a 'solved' config, as 'freewheel calibrate' writes them, or give no "
                  "deadline");
  }
  if (manifest.experts.size() > 1) {
    return Status(Code::kConfig, where,
                  "can't be kept: the bundle has two transformers, and each plans its own steps",
                  "give no deadline, or set computed_steps");
  }
  return {};
}

/// Whether a graph makes the signal of what the first blocks gave.
bool is_probed(const Manifest& manifest, const SignalEntry& signal) {
  return std::any_of(manifest.graphs.begin(), manifest.graphs.end(), [&](const auto& entry) {
    return entry.second.runs == "probe" && entry.second.outputs.count(signal.value) != 0;
  });
}

/// How many blocks a parameter says, or how many there are without one.
std::int64_t blocks_of(const ResolvedSetting& resolved, const std::optional<std::string>& name,
                       std::int64_t without) {
  if (!name) return without;
  return static_cast<std::int64_t>(resolved.parameters.at(*name).front());
}

}  // namespace

Result<ResolvedSetting> ResolvedSetting::create(const Manifest& manifest,
                                                const CacheSetting& setting) {
  ResolvedSetting resolved;
  resolved.setting = setting;
  FREEWHEEL_TRY(keep_bound(resolved.setting));
  FREEWHEEL_ASSIGN(resolved.policy, carried_policy(manifest, setting.policy));
  if (setting.deadline) FREEWHEEL_TRY(check_deadline(manifest, *resolved.policy));
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
  FREEWHEEL_ASSIGN(resolved.parameters, spec.resolve(resolved.setting.parameters));
  if (resolved.signal != nullptr && is_probed(manifest, *resolved.signal)) {
    FREEWHEEL_ASSIGN(resolved.sections, divide(manifest, blocks_of(resolved, spec.first_blocks, 1),
                                               blocks_of(resolved, spec.last_blocks, 0)));
  }
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

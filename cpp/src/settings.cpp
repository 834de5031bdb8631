// SPDX-License-Identifier: Apache-2.0
#include "freewheel/settings.h"

#include <algorithm>

#include "json_value.h"
#include "promise.h"
#include "try.h"

namespace freewheel {
namespace {

template <typename T>
nlohmann::json or_null(const std::optional<T>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json();
}

nlohmann::json policy_json(const PolicySpec& spec) {
  nlohmann::json parameters = nlohmann::json::object();
  for (const auto& [name, parameter] : spec.parameters) {
    parameters[name] = {{"default", json_from_value(parameter.default_value)},
                        {"dtype", dtype_name(parameter.dtype)},
                        {"minimum", or_null(parameter.minimum)},
                        {"maximum", or_null(parameter.maximum)},
                        {"choices", parameter.choices},
                        {"meaning", parameter.meaning}};
  }
  return {{"summary", spec.summary}, {"signals", spec.signals}, {"parameters", parameters}};
}

/// What to do about a name that the bundle does not have.
std::string absent_hint(const std::string& name, std::vector<std::string> known) {
  if (name.find('+') == std::string::npos) return nearest(name, std::move(known));
  return "a pair of policies has a graph of its own: build with --config " + name + " too";
}

nlohmann::json generation_json(const GenerationDefaults& generation) {
  nlohmann::json found = {{"steps", generation.steps},
                          {"height", generation.height},
                          {"width", generation.width},
                          {"frames", generation.frames},
                          {"seed", generation.seed},
                          {"text_tokens", generation.text_tokens},
                          {"guidance_scale", generation.guidance_scale},
                          {"flow_shift", generation.flow_shift}};
  if (generation.guidance_scale_2) found["guidance_scale_2"] = *generation.guidance_scale_2;
  if (!generation.sampler.empty()) found["sampler"] = generation.sampler;
  return found;
}

}  // namespace

Result<ConfigEntry> find_config(const Manifest& manifest, const std::string& name) {
  const auto config = manifest.configs.find(name.empty() ? manifest.default_config : name);
  if (config != manifest.configs.end()) return config->second;
  if (const auto policy = manifest.policies.find(name); policy != manifest.policies.end()) {
    return ConfigEntry{policy->second.setting,
                       manifest.configs.at(manifest.default_config).generation};
  }
  std::vector<std::string> known;
  for (const auto& [key, entry] : manifest.configs) known.push_back(key);
  for (const auto& [key, entry] : manifest.policies) {
    if (manifest.configs.count(key) == 0) known.push_back(key);
  }
  return Status(Code::kConfig, "cache '" + name + "'", "is no config or policy of the bundle",
                absent_hint(name, std::move(known)));
}

Result<const PolicyEntry*> carried_policy(const Manifest& manifest, const std::string& name) {
  const auto found = manifest.policies.find(name);
  if (found != manifest.policies.end()) return &found->second;
  std::vector<std::string> known;
  for (const auto& [key, policy] : manifest.policies) known.push_back(key);
  return Status(Code::kConfig, "policy '" + name + "'", "is not in the bundle",
                absent_hint(name, std::move(known)));
}

Status apply_overrides(const Manifest& manifest, const Overrides& overrides,
                       const std::vector<std::string>& also_known, CacheSetting& setting) {
  FREEWHEEL_ASSIGN(const PolicyEntry* policy, carried_policy(manifest, setting.policy));
  const PolicySpec& spec = policy->spec;
  for (const auto& [name, limit] : policy->setting.guard.limits) {
    setting.guard.limits.try_emplace(name, 0);
  }
  std::vector<Status> faults;
  const auto is_given = [&](const char* name) {
    return std::any_of(overrides.begin(), overrides.end(),
                       [&](const auto& given) { return given.first == name; });
  };
  if (is_given("min_psnr") && is_given("computed_steps")) {
    faults.emplace_back(Code::kConfig, "parameter 'min_psnr'",
                        "chooses 'computed_steps', which is given too", "give one of the two");
  }
  for (const auto& [key, given] : overrides) {
    const auto value = spelled(given);
    Status status =
        value.ok() ? apply_override(key, *value, spec, setting, also_known) : value.status();
    if (!status.ok()) faults.push_back(std::move(status));
  }
  if (faults.empty()) return keep_bound(setting);
  if (faults.size() == 1) return faults.front();
  std::string what = std::to_string(faults.size()) + " faults: ";
  for (const Status& fault : faults) what += (&fault == &faults[0] ? "" : "; ") + fault.message();
  return Status(Code::kConfig, "policy '" + spec.name + "'", what, "correct these parameters");
}

std::string describe(const Manifest& manifest, const std::string& backend) {
  nlohmann::json found = {
      {"freewheel_version", manifest.freewheel_version},
      {"family", manifest.family},
      {"precision", manifest.precision},
      {"backend", backend},
      {"default_config", manifest.default_config},
      {"latent_scale",
       {{"frames", manifest.latent_scale.frames}, {"pixels", manifest.latent_scale.pixels}}},
      {"policies", nlohmann::json::object()},
      {"configs", nlohmann::json::object()},
      {"inputs", nlohmann::json::object()},
      {"samplers", nlohmann::json::array()}};
  for (const auto& [name, policy] : manifest.policies) {
    found["policies"][name] = policy_json(policy.spec);
  }
  for (const auto& [name, config] : manifest.configs) {
    nlohmann::json parameters = nlohmann::json::object();
    for (const auto& [key, value] : config.cache.parameters) {
      parameters[key] = json_from_value(value);
    }
    found["configs"][name] = {{"policy", config.cache.policy},
                              {"parameters", parameters},
                              {"generation", generation_json(config.generation)}};
  }
  for (const auto& [name, input] : manifest.inputs) {
    found["inputs"][name] = {
        {"dtype", dtype_name(input.dtype)}, {"shape", input.text()}, {"runs", input.runs}};
  }
  for (const SamplerEntry& sampler : manifest.samplers) {
    found["samplers"].push_back({{"name", sampler.name},
                                 {"latents", sampler.latents},
                                 {"flow_shift", sampler.flow_shift},
                                 {"steps", sampler.steps}});
  }
  return found.dump();
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "policy_reader.h"

namespace freewheel {
namespace {

using nlohmann::json;

ParameterSpec read_parameter(FieldReader& reader, const json& entry, const std::string& path) {
  ParameterSpec spec;
  spec.dtype = reader.dtype(entry, path, "dtype", "float32");
  spec.shape =
      reader.shape(reader.array(entry, path, "shape", true), path + ".shape", kMaxSmallElements);
  spec.minimum = reader.optional_number(entry, path, "minimum");
  spec.maximum = reader.optional_number(entry, path, "maximum");
  const json& choices = reader.array(entry, path, "choices", true);
  for (const json& choice : choices) {
    if (choice.is_string()) {
      spec.choices.push_back(choice.get<std::string>());
    } else {
      reader.fault(path + ".choices", "should be strings");
    }
  }
  spec.pad_front = reader.text(entry, path, "pad", "edge") == "front";
  spec.listed_in = reader.optional_text(entry, path, "listed_in");
  spec.meaning = reader.text(entry, path, "meaning");
  const json& given = reader.member(entry, path, "default");
  if (const auto value = value_from_json(given)) {
    spec.default_value = *value;
  } else if (!given.is_null()) {
    reader.fault(path + ".default", "is no parameter's value");
  }
  return spec;
}

/// Reads parameter name → value.
std::map<std::string, Value> read_values(FieldReader& reader, const json& parent,
                                         const std::string& path, const std::string& key) {
  std::map<std::string, Value> found;
  for (const auto& [name, given] : reader.object(parent, path, key.c_str(), true).items()) {
    if (const auto value = value_from_json(given)) {
      found[name] = *value;
    } else {
      reader.fault(path + "." + key + "." + name, "is no parameter's value");
    }
  }
  return found;
}

Promise read_promise(FieldReader& reader, const json& entry, const std::string& path) {
  Promise promise;
  promise.coverage = reader.number(entry, path, "coverage");
  if (!(promise.coverage > 0.0 && promise.coverage < 1.0)) {
    reader.fault(path + ".coverage", "is not between 0 and 1");
  }
  promise.runs = reader.integer(entry, path, "runs", 1, kMaxSize);
  for (const json& psnr : reader.array(entry, path, "psnr")) {
    if (psnr.is_number()) {
      promise.psnr.push_back(psnr.get<double>());
    } else {
      reader.fault(path + ".psnr", "should be numbers");
    }
  }
  if (promise.psnr.empty() || promise.psnr.size() > kMaxPromised) {
    reader.fault(path + ".psnr", "are not 1 to " + std::to_string(kMaxPromised));
  }
  return promise;
}

}  // namespace

PolicySpec read_policy_spec(FieldReader& reader, const json& entry, const std::string& path) {
  PolicySpec spec;
  spec.name = reader.text(entry, path, "name");
  spec.summary = reader.text(entry, path, "summary", "");
  spec.reference = reader.text(entry, path, "reference", "");
  spec.distance = reader.optional_text(entry, path, "distance");
  for (const json& signal : reader.array(entry, path, "signals", true)) {
    if (signal.is_string()) spec.signals.push_back(signal.get<std::string>());
  }
  if (const auto feature = reader.optional_text(entry, path, "feature")) {
    spec.wants_feature = true;
    spec.wants_model_output = *feature == "model_output";
    if (*feature != "attention_output" && !spec.wants_model_output) {
      reader.fault(path + ".feature", "is '" + *feature + "', which this version can't tap");
    }
  }
  for (const json& kept : reader.array(entry, path, "kept", true)) {
    if (kept == "previous_signal") {
      spec.keeps_previous_signal = true;
    } else if (kept == "computed_signal") {
      spec.keeps_computed_signal = true;
    } else if (kept == "older_signal") {
      spec.keeps_older_signal = true;
    } else if (kept == "previous_feature") {
      spec.keeps_previous_feature = true;
    } else if (kept == "gram") {
      spec.keeps_gram = true;
    } else {
      reader.fault(path + ".kept", "names " + kept.dump() + ", which this version can't keep");
    }
  }
  spec.is_one_decision = reader.flag(entry, path, "one_decision");
  const json& history = reader.object(entry, path, "history");
  spec.history.maximum = reader.integer(history, path + ".history", "maximum", 1, kMaxHistory);
  spec.history.depth =
      reader.integer(history, path + ".history", "depth", 0, spec.history.maximum, 1);
  spec.history.parameter = reader.optional_text(history, path + ".history", "parameter");
  spec.history.offset =
      reader.integer(history, path + ".history", "offset", -kMaxHistory, kMaxHistory, 0);
  for (const auto& [name, state] : reader.object(entry, path, "state", true).items()) {
    const std::string place = path + ".state." + name;
    StateSpec& read = spec.state[name];
    read.shape = reader.shape(reader.array(state, place, "shape", true), place + ".shape",
                              kMaxSmallElements);
    read.dtype = reader.dtype(state, place, "dtype", "float32");
    read.initial = reader.optional_number(state, place, "initial").value_or(0.0);
  }
  for (const auto& [name, parameter] : reader.object(entry, path, "parameters", true).items()) {
    spec.parameters[name] = read_parameter(reader, parameter, path + ".parameters." + name);
  }
  for (const auto& [name, parameter] : spec.parameters) {
    const auto listed =
        parameter.listed_in ? spec.parameters.find(*parameter.listed_in) : spec.parameters.end();
    if (!parameter.listed_in || (listed != spec.parameters.end() && parameter.shape.rank() == 0 &&
                                 listed->second.shape.rank() == 1)) {
      continue;
    }
    reader.fault(path + ".parameters." + name + ".listed_in", "names no list, or is a list's own");
  }
  if (spec.history.parameter && spec.parameters.count(*spec.history.parameter) == 0) {
    reader.fault(path + ".history.parameter", "names no parameter");
  }
  for (const auto& [key, name] : {std::pair{"first_blocks", &spec.first_blocks},
                                  std::pair{"last_blocks", &spec.last_blocks}}) {
    *name = reader.optional_text(entry, path, key);
    const auto found = *name ? spec.parameters.find(**name) : spec.parameters.end();
    const bool is_count = found != spec.parameters.end() && found->second.dtype == DType::kInt64 &&
                          found->second.shape.rank() == 0;
    if (*name && !is_count) reader.fault(path + "." + key, "names no integer parameter");
  }
  if (spec.distance && spec.state.count(*spec.distance) == 0) {
    reader.fault(path + ".distance", "names no state");
  }
  return spec;
}

CacheSetting read_setting(FieldReader& reader, const json& entry, const std::string& path) {
  CacheSetting setting;
  setting.policy = reader.text(entry, path, "policy", "off");
  setting.signal = reader.optional_text(entry, path, "signal");
  setting.deadline = reader.optional_number(entry, path, "deadline");
  if (setting.deadline && !(*setting.deadline > 0.0)) {
    reader.fault(path + ".deadline", "is not above 0");
  }
  setting.min_psnr = reader.optional_number(entry, path, "min_psnr");
  if (setting.min_psnr && !(*setting.min_psnr > 0.0)) {
    reader.fault(path + ".min_psnr", "is not above 0");
  }
  if (entry.contains("promise") && !entry["promise"].is_null()) {
    setting.promise =
        read_promise(reader, reader.object(entry, path, "promise"), path + ".promise");
  }
  setting.parameters = read_values(reader, entry, path, "parameters");
  for (const auto& [branch, given] : reader.object(entry, path, "branches", true).items()) {
    setting.branches[branch] = read_values(reader, entry["branches"], path + ".branches", branch);
  }
  const json& guard = reader.object(entry, path, "guard", true);
  const std::string place = path + ".guard";
  for (const auto& [name, limit] : guard.items()) {
    if (name == "exact_steps") continue;
    setting.guard.limits[name] = reader.integer(guard, place, name.c_str(), 0, kMaxSize);
  }
  for (const json& step : reader.array(guard, place, "exact_steps", true)) {
    setting.guard.exact_steps.push_back(reader.integer(step, place + ".exact_steps", 0, kMaxSize));
  }
  return setting;
}

ConfigEntry read_config(FieldReader& reader, const json& entry, const std::string& path) {
  ConfigEntry config;
  config.cache = read_setting(reader, reader.object(entry, path, "cache"), path + ".cache");
  const json& generation = reader.object(entry, path, "generation");
  const std::string place = path + ".generation";
  GenerationDefaults& run = config.generation;
  run.steps = reader.integer(generation, place, "steps", 1, kMaxSize);
  run.height = reader.integer(generation, place, "height", 1, kMaxSize);
  run.width = reader.integer(generation, place, "width", 1, kMaxSize);
  run.frames = reader.integer(generation, place, "frames", 1, kMaxSize);
  run.seed = reader.integer(generation, place, "seed", 0, kMaxSeed);
  run.text_tokens = reader.integer(generation, place, "text_tokens", 1, kMaxSize);
  run.guidance_scale = reader.number(generation, place, "guidance_scale");
  run.flow_shift = reader.number(generation, place, "flow_shift");
  run.guidance_scale_2 = reader.optional_number(generation, place, "guidance_scale_2");
  run.sampler = reader.optional_text(generation, place, "sampler").value_or("");
  if (!(run.flow_shift > 0.0)) reader.fault(place + ".flow_shift", "is not above 0");
  return config;
}

}  // namespace freewheel

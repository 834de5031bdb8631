// SPDX-License-Identifier: Apache-2.0
#include "freewheel/manifest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "json_value.h"
#include "try.h"

namespace freewheel {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 48;
constexpr std::size_t kMaxEntries = 1'000'000;
constexpr std::int64_t kMaxBlocks = 4096;
constexpr std::size_t kMaxExperts = 16;
constexpr std::int64_t kMaxHistory = 64;
constexpr std::int64_t kMaxSmallElements = 65536;
constexpr std::int64_t kMaxLatentScale = 1024;
constexpr std::int64_t kMaxVideoSide = 1 << 15;
constexpr std::int64_t kMaxSeed = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxFaultsShown = 10;

/// Reads fields of JSON objects and gathers what is wrong with them, by path.
class Reader {
 public:
  void fault(const std::string& path, const std::string& what) {
    ++count_;
    if (faults_.size() < kMaxFaultsShown) faults_.push_back("'" + path + "' " + what);
  }

  /// The member `key`, or null where it is missing (a fault unless optional).
  const json& member(const json& object, const std::string& path, const char* key,
                     bool optional = false) {
    static const json nothing;
    const auto found = object.is_object() ? object.find(key) : object.end();
    if (object.is_object() && found != object.end()) return *found;
    if (!optional) fault(join(path, key), "is missing");
    return nothing;
  }

  const json& object(const json& parent, const std::string& path, const char* key,
                     bool optional = false) {
    return typed(member(parent, path, key, optional), join(path, key), json::value_t::object,
                 "an object", optional);
  }

  const json& array(const json& parent, const std::string& path, const char* key,
                    bool optional = false) {
    return typed(member(parent, path, key, optional), join(path, key), json::value_t::array,
                 "a list", optional);
  }

  std::string text(const json& parent, const std::string& path, const char* key,
                   const char* fallback = nullptr) {
    const json& found = member(parent, path, key, fallback != nullptr);
    if (found.is_null() && fallback != nullptr) return fallback;
    if (found.is_string()) return found.get<std::string>();
    if (!found.is_null()) fault(join(path, key), "should be a string");
    return {};
  }

  std::optional<std::string> optional_text(const json& parent, const std::string& path,
                                           const char* key) {
    const json& found = member(parent, path, key, true);
    if (found.is_null()) return std::nullopt;
    if (found.is_string()) return found.get<std::string>();
    fault(join(path, key), "should be a string or null");
    return std::nullopt;
  }

  std::int64_t integer(const json& value, const std::string& path, std::int64_t low,
                       std::int64_t high) {
    if (value.is_number_integer()) {
      const bool huge = value.is_number_unsigned() &&
                        value.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxSeed);
      const auto found = huge ? kMaxSeed : value.get<std::int64_t>();
      if (!huge && found >= low && found <= high) return found;
      fault(path, "is " + value.dump() + ", outside [" + std::to_string(low) + ", " +
                      std::to_string(high) + "]");
    } else if (!value.is_null()) {
      fault(path, "should be an integer");
    }
    return low;
  }

  std::int64_t integer(const json& parent, const std::string& path, const char* key,
                       std::int64_t low, std::int64_t high,
                       std::optional<std::int64_t> fallback = std::nullopt) {
    const json& found = member(parent, path, key, fallback.has_value());
    if (found.is_null() && fallback) return *fallback;
    return integer(found, join(path, key), low, high);
  }

  std::optional<double> optional_number(const json& parent, const std::string& path,
                                        const char* key) {
    const json& found = member(parent, path, key, true);
    if (found.is_null()) return std::nullopt;
    if (found.is_number()) return found.get<double>();
    fault(join(path, key), "should be a number or null");
    return std::nullopt;
  }

  double number(const json& parent, const std::string& path, const char* key) {
    const json& found = member(parent, path, key);
    if (found.is_number()) return found.get<double>();
    if (!found.is_null()) fault(join(path, key), "should be a number");
    return 1.0;
  }

  bool flag(const json& parent, const std::string& path, const char* key) {
    const json& found = member(parent, path, key, true);
    if (found.is_boolean()) return found.get<bool>();
    if (!found.is_null()) fault(join(path, key), "should be true or false");
    return false;
  }

  DType dtype(const json& parent, const std::string& path, const char* key,
              const char* fallback = nullptr) {
    const std::string name = text(parent, path, key, fallback);
    const auto found = dtype_from_name(name);
    if (!found && !name.empty()) fault(join(path, key), "is '" + name + "', no dtype");
    return found.value_or(DType::kFloat32);
  }

  Shape shape(const json& list, const std::string& path, std::int64_t largest) {
    Shape found;
    if (!list.is_array()) return found;
    if (list.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
      fault(path, "has rank " + std::to_string(list.size()) + ", at most 8 is read");
      return found;
    }
    std::int64_t elements = 1;
    for (const json& size : list) {
      const std::int64_t read = integer(size, path, 0, kMaxSize);
      if (read != 0 && elements > largest / read) {
        fault(path, "has absurdly many elements");
        return found;
      }
      elements *= read;
      found.push_back(read);
    }
    return found;
  }

  bool is_sane_count(const json& container, const std::string& path) {
    if (container.size() <= kMaxEntries) return true;
    fault(path, "has " + std::to_string(container.size()) + " entries");
    return false;
  }

  Status status(const std::string& where) const {
    if (count_ == 0) return {};
    std::string what = std::to_string(count_) + (count_ == 1 ? " fault: " : " faults: ");
    for (std::size_t i = 0; i < faults_.size(); ++i) what += (i > 0 ? "; " : "") + faults_[i];
    return Status(Code::kBundle, where, what, "build the bundle again");
  }

  static std::string join(const std::string& path, const std::string& key) {
    return path.empty() ? key : path + "." + key;
  }

 private:
  const json& typed(const json& found, const std::string& path, json::value_t type,
                    const char* kind, bool optional) {
    static const json empty_object = json::object(), empty_array = json::array();
    if (found.type() == type && is_sane_count(found, path)) return found;
    if (found.type() != type && !(found.is_null() && optional) && !found.is_null()) {
      fault(path, std::string("should be ") + kind);
    }
    return type == json::value_t::object ? empty_object : empty_array;
  }

  std::vector<std::string> faults_;
  std::size_t count_ = 0;
};

void read_io(Reader& reader, const json& entry, const std::string& path, Io& io) {
  io.dtype = reader.dtype(entry, path, "dtype");
  const json& shape = reader.array(entry, path, "shape");
  if (shape.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
    reader.fault(path + ".shape", "has rank " + std::to_string(shape.size()));
    return;
  }
  for (const json& size : shape) {
    if (size.is_string()) {
      io.shape.emplace_back(size.get<std::string>());
    } else {
      io.shape.emplace_back(reader.integer(size, path + ".shape", 0, kMaxSize));
    }
  }
}

std::map<std::string, Io> read_ios(Reader& reader, const json& parent, const std::string& path,
                                   const char* key) {
  std::map<std::string, Io> found;
  for (const auto& [name, entry] : reader.object(parent, path, key).items()) {
    read_io(reader, entry, path + "." + key + "." + name, found[name]);
  }
  return found;
}

GraphEntry read_graph(Reader& reader, const json& entry, const std::string& path) {
  GraphEntry graph;
  graph.file = reader.text(entry, path, "file");
  graph.runs = reader.text(entry, path, "runs");
  graph.precision = reader.text(entry, path, "precision", "float32");
  graph.inputs = read_ios(reader, entry, path, "inputs");
  graph.outputs = read_ios(reader, entry, path, "outputs");
  for (const auto& [name, tensor] : reader.object(entry, path, "weights", true).items()) {
    if (tensor.is_string()) {
      graph.weights[name] = tensor.get<std::string>();
    } else {
      reader.fault(path + ".weights." + name, "should be a string");
    }
  }
  return graph;
}

ParameterSpec read_parameter(Reader& reader, const json& entry, const std::string& path) {
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
  spec.meaning = reader.text(entry, path, "meaning");
  const json& given = reader.member(entry, path, "default");
  if (const auto value = value_from_json(given)) {
    spec.default_value = *value;
  } else if (!given.is_null()) {
    reader.fault(path + ".default", "is no parameter's value");
  }
  return spec;
}

PolicySpec read_policy_spec(Reader& reader, const json& entry, const std::string& path) {
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
  if (spec.history.parameter && spec.parameters.count(*spec.history.parameter) == 0) {
    reader.fault(path + ".history.parameter", "names no parameter");
  }
  if (spec.distance && spec.state.count(*spec.distance) == 0) {
    reader.fault(path + ".distance", "names no state");
  }
  return spec;
}

/// Reads parameter name → value.
std::map<std::string, Value> read_values(Reader& reader, const json& parent,
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

CacheSetting read_setting(Reader& reader, const json& entry, const std::string& path) {
  CacheSetting setting;
  setting.policy = reader.text(entry, path, "policy", "off");
  setting.signal = reader.optional_text(entry, path, "signal");
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

ConfigEntry read_config(Reader& reader, const json& entry, const std::string& path) {
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
  if (!(run.flow_shift > 0.0)) reader.fault(place + ".flow_shift", "is not above 0");
  return config;
}

void read_model(Reader& reader, const json& data, Manifest& manifest) {
  manifest.freewheel_version = reader.text(data, "", "freewheel_version");
  manifest.family = reader.text(data, "", "family");
  manifest.precision = reader.text(data, "", "precision");
  manifest.weights = reader.text(data, "", "weights");
  for (const auto& [name, entry] : reader.object(data, "", "inputs").items()) {
    InputEntry& input = manifest.inputs[name];
    read_io(reader, entry, "inputs." + name, input);
    input.argument = reader.text(entry, "inputs." + name, "argument");
    input.runs = reader.text(entry, "inputs." + name, "runs");
  }
  for (const auto& [name, factors] : reader.object(data, "", "dims").items()) {
    auto& read = manifest.dims[name];
    for (const json& factor : factors) {
      if (factor.is_array() && factor.size() == 2 && factor[0].is_string()) {
        read.emplace_back(factor[0].get<std::string>(),
                          reader.integer(factor[1], "dims." + name, 1, kMaxSize));
      } else {
        reader.fault("dims." + name, "should be pairs of a dimension and a divisor");
      }
    }
  }
  if (data.contains("sums")) {
    for (const auto& [name, terms] : reader.object(data, "", "sums").items()) {
      for (const json& term : terms) {
        if (!term.is_string()) {
          reader.fault("sums." + name, "should be names of dimensions");
        } else {
          manifest.sums[name].push_back(term.get<std::string>());
        }
      }
    }
  }
  const json& scale = reader.object(data, "", "latent_scale");
  manifest.latent_scale.frames =
      reader.integer(scale, "latent_scale", "frames", 1, kMaxLatentScale);
  manifest.latent_scale.pixels =
      reader.integer(scale, "latent_scale", "pixels", 1, kMaxLatentScale);
  if (const json& size = reader.member(data, "", "vocabulary_size", true); !size.is_null()) {
    manifest.vocabulary_size = reader.integer(size, "vocabulary_size", 1, kMaxSize);
  }
  for (const auto& [name, entry] : reader.object(data, "", "graphs").items()) {
    manifest.graphs[name] = read_graph(reader, entry, "graphs." + name);
  }
  const json& stages = reader.array(data, "", "stages");
  std::int64_t blocks = 0;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const std::string path = "stages." + std::to_string(i);
    StageEntry stage;
    stage.block = reader.text(stages[i], path, "block");
    stage.context = reader.optional_text(stages[i], path, "context");
    stage.tapped = reader.optional_text(stages[i], path, "tapped");
    stage.first = reader.integer(stages[i], path, "first", 0, kMaxBlocks);
    stage.count = reader.integer(stages[i], path, "count", 1, kMaxBlocks);
    std::int64_t grouped = stage.first;
    for (const json& entry : reader.array(stages[i], path, "groups", true)) {
      const std::string place = path + ".groups";
      GroupEntry group{reader.text(entry, place, "graph"),
                       reader.integer(entry, place, "first", 0, kMaxBlocks),
                       reader.integer(entry, place, "count", 1, kMaxBlocks)};
      if (group.first != grouped) reader.fault(place, "are not consecutive");
      grouped = group.first + group.count;
      stage.groups.push_back(std::move(group));
    }
    if (!stage.groups.empty() && grouped != stage.first + stage.count) {
      reader.fault(path + ".groups", "don't cover the stage's blocks");
    }
    blocks += stage.count;
    manifest.stages.push_back(std::move(stage));
  }
  const json& experts = reader.array(data, "", "experts", true);
  if (experts.size() > kMaxExperts) {
    reader.fault("experts", "are " + std::to_string(experts.size()));
  }
  for (std::size_t i = 0; i < std::min(experts.size(), kMaxExperts); ++i) {
    const std::string path = "experts." + std::to_string(i);
    ExpertEntry expert;
    expert.part = reader.text(experts[i], path, "part");
    expert.prefix = reader.text(experts[i], path, "prefix");
    const auto from = reader.optional_number(experts[i], path, "from_timestep");
    if (!from) reader.fault(path + ".from_timestep", "is missing");
    expert.from_timestep = from.value_or(0.0);
    if (!manifest.experts.empty() &&
        !(expert.from_timestep < manifest.experts.back().from_timestep)) {
      reader.fault(path + ".from_timestep", "is not below the expert's before it");
    }
    manifest.experts.push_back(std::move(expert));
  }
  if (blocks > kMaxBlocks) reader.fault("stages", "have " + std::to_string(blocks) + " blocks");
  for (const auto& [name, entry] : reader.object(data, "", "signals").items()) {
    const std::string known = reader.text(entry, "signals." + name, "known");
    if (known != "run" && known != "step") {
      reader.fault("signals." + name + ".known", "should be 'run' or 'step'");
    }
    manifest.signals[name] = {reader.text(entry, "signals." + name, "value"), known == "run"};
  }
  manifest.feature_block = reader.integer(data, "", "feature_block", 0, kMaxBlocks);
  manifest.history_dtype = reader.dtype(data, "", "history_dtype");
}

void read_contents(Reader& reader, const json& data, Manifest& manifest) {
  for (const auto& [name, entry] : reader.object(data, "", "policies").items()) {
    const std::string path = "policies." + name;
    manifest.policies[name] = {
        reader.text(entry, path, "graph"),
        read_policy_spec(reader, reader.object(entry, path, "spec"), path + ".spec"),
        read_setting(reader, reader.object(entry, path, "setting"), path + ".setting")};
  }
  for (const auto& [name, entry] : reader.object(data, "", "configs").items()) {
    manifest.configs[name] = read_config(reader, entry, "configs." + name);
  }
  manifest.default_config = reader.text(data, "", "default_config");
  for (const auto& [name, entry] : reader.object(data, "", "tensors").items()) {
    const std::string path = "tensors." + name;
    TensorEntry& tensor = manifest.tensors[name];
    tensor.file = reader.text(entry, path, "file");
    tensor.dtype = reader.dtype(entry, path, "dtype");
    tensor.shape = reader.shape(reader.array(entry, path, "shape"), path + ".shape", kMaxSize / 8);
    tensor.offset = reader.integer(entry, path, "offset", 0, kMaxSize);
    tensor.bytes = reader.integer(entry, path, "bytes", 0, kMaxSize);
    const auto implied =
        static_cast<std::int64_t>(item_bytes(tensor.dtype)) * tensor.shape.elements();
    if (tensor.bytes != implied) {
      reader.fault(path + ".bytes", "is " + std::to_string(tensor.bytes) + ", its shape implies " +
                                        std::to_string(implied));
    }
  }
  const json& sets = reader.array(data, "", "engines");
  for (std::size_t i = 0; i < sets.size(); ++i) {
    const std::string path = "engines." + std::to_string(i);
    EngineSet set;
    set.backend = reader.text(sets[i], path, "backend");
    set.target = reader.text(sets[i], path, "target");
    for (const auto& [graph, file] : reader.object(sets[i], path, "files").items()) {
      if (file.is_string()) {
        set.files[graph] = file.get<std::string>();
      } else {
        reader.fault(path + ".files." + graph, "should be a string");
      }
    }
    manifest.engines.push_back(std::move(set));
  }
  const json& samplers = reader.array(data, "", "samplers", true);
  for (std::size_t i = 0; i < samplers.size(); ++i) {
    const std::string path = "samplers." + std::to_string(i);
    SamplerEntry sampler;
    sampler.name = reader.text(samplers[i], path, "name");
    sampler.scheduler = reader.text(samplers[i], path, "scheduler", "");
    sampler.file = reader.text(samplers[i], path, "file");
    sampler.flow_shift = reader.optional_number(samplers[i], path, "flow_shift").value_or(1.0);
    sampler.window = reader.integer(samplers[i], path, "window", 1, 16);
    for (const json& steps : reader.array(samplers[i], path, "steps")) {
      sampler.steps.push_back(reader.integer(steps, path + ".steps", 1, 100'000));
    }
    manifest.samplers.push_back(std::move(sampler));
  }
  for (const auto& [name, entry] : reader.object(data, "", "files").items()) {
    manifest.files[name] = {reader.integer(entry, "files." + name, "bytes", 0, kMaxSize),
                            reader.text(entry, "files." + name, "sha256")};
  }
}

/// Checks that names which one part of a manifest uses are there in another.
void check_references(Reader& reader, const Manifest& manifest) {
  const auto has_graph = [&](const std::string& name) { return manifest.graphs.count(name) != 0; };
  const auto wants_graph = [&](const std::string& path, const std::string& name) {
    if (!has_graph(name)) reader.fault(path, "names graph '" + name + "', which is not there");
  };
  for (const char* name : {"prompt", "head", "finish", "delta", "reuse"}) {
    if (!has_graph(name)) reader.fault(std::string("graphs.") + name, "is missing");
  }
  for (std::size_t i = 0; i < manifest.stages.size(); ++i) {
    const StageEntry& stage = manifest.stages[i];
    const std::string path = "stages." + std::to_string(i);
    wants_graph(path + ".block", stage.block);
    if (stage.context) wants_graph(path + ".context", *stage.context);
    if (stage.tapped) wants_graph(path + ".tapped", *stage.tapped);
    for (const GroupEntry& group : stage.groups) wants_graph(path + ".groups", group.graph);
  }
  for (const auto& [name, policy] : manifest.policies) {
    wants_graph("policies." + name + ".graph", policy.graph);
    if (!policy.spec.keeps_gram) continue;
    const auto gram = manifest.graphs.find("gram");
    if (gram == manifest.graphs.end() || gram->second.outputs.count("gram") == 0) {
      reader.fault("policies." + name + ".spec.kept", "has 'gram', which no graph 'gram' gives");
    }
    const HistorySpec& history = policy.spec.history;
    if (history.parameter || history.depth != history.maximum) {
      reader.fault("policies." + name + ".spec.history", "keeps 'gram' and not all residuals");
    }
  }
  if (has_graph("finish") && manifest.graphs.at("finish").outputs.count("model_output") == 0) {
    reader.fault("graphs.finish.outputs", "lack 'model_output'");
  }
  if (has_graph("text_encoder") && !manifest.vocabulary_size) {
    reader.fault("vocabulary_size", "is missing, and there is a text encoder");
  }
  if (manifest.stages.empty()) reader.fault("stages", "is empty");
  if (manifest.engines.empty()) reader.fault("engines", "is empty");
  if (manifest.configs.count(manifest.default_config) == 0) {
    reader.fault("default_config", "names no config");
  }
  for (const auto& [name, graph] : manifest.graphs) {
    if (manifest.files.count(graph.file) == 0) {
      reader.fault("graphs." + name + ".file", "'" + graph.file + "' is not among the files");
    }
  }
  for (const auto& [name, tensor] : manifest.tensors) {
    const auto file = manifest.files.find(tensor.file);
    if (file == manifest.files.end() || tensor.bytes > file->second.bytes ||
        tensor.offset > file->second.bytes - tensor.bytes) {
      reader.fault("tensors." + name, "lies outside file '" + tensor.file + "'");
    }
  }
  for (const SamplerEntry& sampler : manifest.samplers) {
    if (manifest.files.count(sampler.file) == 0) {
      reader.fault("samplers", "file '" + sampler.file + "' is not among the files");
    }
  }
}

}  // namespace

std::string Io::text() const {
  std::string text = "[";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (axis > 0) text += ", ";
    const std::string* name = std::get_if<std::string>(&shape[axis]);
    text += name != nullptr ? *name : std::to_string(std::get<std::int64_t>(shape[axis]));
  }
  return text + "]";
}

Result<Manifest> Manifest::parse(const std::string& text, const std::string& where) {
  FREEWHEEL_ASSIGN(const json data, parse_json(text, where, "build the bundle again"));
  Reader reader;
  const json& version = reader.member(data, "", "schema_version");
  if (version.is_number_integer() && version.get<std::int64_t>() > kSchemaVersion) {
    return Status(Code::kBundle, where,
                  "has schema_version " + version.dump() + "; this Freewheel reads up to " +
                      std::to_string(kSchemaVersion),
                  "update Freewheel, or build the bundle again with this version");
  }
  if (version.is_number_integer() && version.get<std::int64_t>() < kSchemaVersion) {
    return Status(Code::kBundle, where,
                  "has schema_version " + version.dump() + "; this Freewheel reads " +
                      std::to_string(kSchemaVersion),
                  "build the bundle again");
  }
  reader.integer(version, "schema_version", kSchemaVersion, kSchemaVersion);
  Manifest manifest;
  read_model(reader, data, manifest);
  read_contents(reader, data, manifest);
  check_references(reader, manifest);
  FREEWHEEL_TRY(reader.status(where));
  return manifest;
}

Result<Dims> match_dims(const std::string& name, const Io& io, const Shape& shape) {
  Dims sizes;
  bool fits = shape.rank() == static_cast<int>(io.shape.size());
  for (int axis = 0; fits && axis < shape.rank(); ++axis) {
    const Io::Dim& dim = io.shape[static_cast<std::size_t>(axis)];
    if (const std::string* key = std::get_if<std::string>(&dim)) {
      fits = sizes.emplace(*key, shape[axis]).first->second == shape[axis];
    } else {
      fits = std::get<std::int64_t>(dim) == shape[axis];
    }
    fits = fits && shape[axis] > 0;
  }
  if (!fits) {
    return Status(Code::kRequest, "input '" + name + "'",
                  "has shape " + shape.text() + ", the bundle takes " + io.text(),
                  "give latents and embeddings of the model that the bundle was built from");
  }
  return sizes;
}

Result<Dims> derive_dims(const Manifest& manifest, const Dims& sizes) {
  Dims dims = sizes;
  for (const auto& [name, factors] : manifest.dims) {
    std::int64_t product = 1;
    bool is_known = true;
    for (const auto& [dim, divisor] : factors) {
      const auto found = dims.find(dim);
      is_known = is_known && found != dims.end();  // else an input still to come tells it
      if (!is_known) break;
      if (found->second % divisor != 0) {
        return Status(Code::kRequest, "dimension '" + dim + "'",
                      "is " + std::to_string(found->second) + ", which " + std::to_string(divisor) +
                          " does not divide",
                      "choose a size that the model's patches divide");
      }
      const std::int64_t factor = found->second / divisor;
      if (factor != 0 && product > kMaxSize / factor) {
        return Status(Code::kRequest, "dimension '" + name + "'", "is absurdly large",
                      "choose a smaller size");
      }
      product *= factor;
    }
    if (!is_known) continue;
    if (const auto known = dims.emplace(name, product).first; known->second != product) {
      return Status(Code::kRequest, "dimension '" + name + "'",
                    "is " + std::to_string(known->second) + ", but what it derives from gives " +
                        std::to_string(product),
                    "give sizes that belong to the latents");
    }
  }
  for (const auto& [name, terms] : manifest.sums) {
    std::int64_t sum = 0;
    bool is_known = !terms.empty();
    for (const std::string& term : terms) {
      const auto found = dims.find(term);
      is_known = is_known && found != dims.end();
      if (!is_known) break;
      sum = std::min(sum + found->second, kMaxSize);
    }
    if (is_known) dims[name] = sum;
  }
  return dims;
}

Result<Shape> shape_of(const std::string& name, const Io& io, const Dims& dims) {
  Shape shape;
  std::int64_t elements = 1;
  for (const Io::Dim& dim : io.shape) {
    std::int64_t size = 0;
    if (const std::string* key = std::get_if<std::string>(&dim)) {
      const auto found = dims.find(*key);
      if (found == dims.end()) {
        return Status(Code::kBundle, "tensor '" + name + "'",
                      "has a dimension '" + *key + "' whose size nothing tells",
                      "build the bundle again");
      }
      size = found->second;
    } else {
      size = std::get<std::int64_t>(dim);
    }
    if (size != 0 && elements > kMaxSize / size) {
      return Status(Code::kRequest, "tensor '" + name + "'", "is absurdly large",
                    "choose a smaller size");
    }
    elements *= size;
    shape.push_back(size);
  }
  return shape;
}

Result<Shape> latent_shape(const Manifest& manifest, std::int64_t frames, std::int64_t height,
                           std::int64_t width) {
  const LatentScale& scale = manifest.latent_scale;
  const std::string most = std::to_string(kMaxVideoSide);
  if (frames < 1 || frames > kMaxVideoSide || (frames - 1) % scale.frames != 0) {
    const std::int64_t within = std::clamp<std::int64_t>(frames, 1, kMaxVideoSide - scale.frames);
    return Status(
        Code::kRequest, "frames",
        "are " + std::to_string(frames) + ", expected " +
            (frames > kMaxVideoSide ? most + " at most"
                                    : "1 more than a multiple of " + std::to_string(scale.frames)),
        "ask for " + std::to_string(within / scale.frames * scale.frames + 1));
  }
  const std::pair<const char*, std::int64_t> sides[] = {{"height", height}, {"width", width}};
  for (const auto& [name, pixels] : sides) {
    std::int64_t multiple = scale.pixels;
    for (const auto& [dim, factors] : manifest.dims) {
      for (const auto& [factor, divisor] : factors) {
        if (factor == name && divisor <= kMaxLatentScale) {
          multiple = std::max(multiple, scale.pixels * divisor);
        }
      }
    }
    if (pixels < multiple || pixels > kMaxVideoSide || pixels % multiple != 0) {
      const std::int64_t within = std::min(pixels, kMaxVideoSide) / multiple * multiple;
      return Status(
          Code::kRequest, name,
          "is " + std::to_string(pixels) + ", expected " +
              (pixels > kMaxVideoSide ? most + " pixels at most"
                                      : "a multiple of " + std::to_string(multiple) + " pixels"),
          "ask for " + std::to_string(std::max(within, multiple)));
    }
  }
  FREEWHEEL_ASSIGN(const Dims dims,
                   derive_dims(manifest, {{"batch", 1},
                                          {"frames", (frames - 1) / scale.frames + 1},
                                          {"height", height / scale.pixels},
                                          {"width", width / scale.pixels}}));
  return shape_of("latents", manifest.graphs.at("finish").outputs.at("model_output"), dims);
}

Result<std::string> check_geometry(const Manifest& manifest, const std::string& config,
                                   const Shape& latents, bool force) {
  const auto found = manifest.configs.find(config);
  if (found == manifest.configs.end()) return std::string();
  const GenerationDefaults& made = found->second.generation;
  const GenerationDefaults& own = manifest.configs.at(manifest.default_config).generation;
  if (made.width == own.width && made.height == own.height && made.frames == own.frames) {
    return std::string();
  }
  const auto text = [](const GenerationDefaults& size) {
    return std::to_string(size.width) + "x" + std::to_string(size.height) + ", " +
           std::to_string(size.frames) + " frames";
  };
  FREEWHEEL_ASSIGN(const Shape usual, latent_shape(manifest, own.frames, own.height, own.width));
  const std::int64_t times = latents.elements() / std::max<std::int64_t>(1, usual.elements());
  const std::string what = "was made for " + text(made) + ", and the bundle's own size is " +
                           text(own) + ": this run has " + std::to_string(times) +
                           " times its latents";
  if (times >= kFarBeyond && !force) {
    return Status(Code::kRequest, "config '" + config + "'", what,
                  "run at the bundle's size: height " + std::to_string(own.height) + ", width " +
                      std::to_string(own.width) + ", frames " + std::to_string(own.frames) +
                      "; or run it with 'force'");
  }
  return "config '" + config + "' " + what;
}

}  // namespace freewheel

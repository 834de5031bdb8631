// SPDX-License-Identifier: Apache-2.0
#include "freewheel/manifest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "field_reader.h"
#include "manifest_checks.h"
#include "policy_reader.h"
#include "streams.h"
#include "try.h"

namespace freewheel {
namespace {

using nlohmann::json;

void read_io(FieldReader& reader, const json& entry, const std::string& path, Io& io) {
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

std::map<std::string, Io> read_ios(FieldReader& reader, const json& parent, const std::string& path,
                                   const char* key) {
  std::map<std::string, Io> found;
  for (const auto& [name, entry] : reader.object(parent, path, key).items()) {
    read_io(reader, entry, path + "." + key + "." + name, found[name]);
  }
  return found;
}

GraphEntry read_graph(FieldReader& reader, const json& entry, const std::string& path) {
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

SumTerm read_term(FieldReader& reader, const json& term, const std::string& path) {
  if (term.is_string()) return {term.get<std::string>(), 1};
  if (term.is_array() && term.size() == 2 && term[0].is_string()) {
    return {term[0].get<std::string>(), reader.integer(term[1], path, 1, kMaxSize)};
  }
  if (term.is_number_integer()) {
    const bool is_taken = term < 0;  // from the others
    return {"", reader.integer(term, path, is_taken ? -kMaxSize : 1, is_taken ? -1 : kMaxSize)};
  }
  reader.fault(path, "should be dimensions, numbers, or pairs of a dimension and a multiple");
  return {};
}

void read_model(FieldReader& reader, const json& data, Manifest& manifest) {
  manifest.freewheel_version = reader.text(data, "", "freewheel_version");
  manifest.family = reader.text(data, "", "family");
  manifest.precision = reader.text(data, "", "precision");
  manifest.weights = reader.text(data, "", "weights");
  manifest.checkpoint_sha256 =
      reader.text(reader.object(data, "", "checkpoint"), "checkpoint", "sha256");
  for (const auto& [name, entry] : reader.object(data, "", "inputs").items()) {
    InputEntry& input = manifest.inputs[name];
    read_io(reader, entry, "inputs." + name, input);
    input.argument = reader.text(entry, "inputs." + name, "argument");
    input.runs = reader.text(entry, "inputs." + name, "runs");
    for (const json& one : reader.array(entry, "inputs." + name, "of", true)) {
      input.of.push_back(one.is_string() ? one.get<std::string>() : std::string());
    }
    if (input.of.empty()) input.of.emplace_back(kLatents);
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
        manifest.sums[name].push_back(read_term(reader, term, "sums." + name));
      }
    }
  }
  for (const auto& [name, entry] : reader.object(data, "", "limits", true).items()) {
    const std::string path = "limits." + name;
    manifest.limits[name] = {reader.integer(entry, path, "most", 1, kMaxSize),
                             reader.text(entry, path, "where")};
  }
  const json& scale = reader.object(data, "", "latent_scale");
  manifest.latent_scale.frames =
      reader.integer(scale, "latent_scale", "frames", 1, kMaxLatentScale);
  manifest.latent_scale.pixels =
      reader.integer(scale, "latent_scale", "pixels", 1, kMaxLatentScale);
  if (const json& size = reader.member(data, "", "vocabulary_size", true); !size.is_null()) {
    manifest.vocabulary_size = reader.integer(size, "vocabulary_size", 1, kMaxSize);
  }
  if (const json& entry = reader.member(data, "", "tokenizer", true); !entry.is_null()) {
    manifest.tokenizer = TokenizerEntry{reader.text(entry, "tokenizer", "file"), {}};
    if (const json& id = reader.member(entry, "tokenizer", "unknown", true); !id.is_null()) {
      manifest.tokenizer->unknown = reader.integer(id, "tokenizer.unknown", 0, kMaxSize);
    }
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
    stage.modulation = reader.optional_text(stages[i], path, "modulation");
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
    for (const auto& [name, entry] : reader.object(stages[i], path, "skips", true).items()) {
      const std::string place = path + ".skips." + name;
      SkipEntry& skip = stage.skips[name];
      skip.stream = reader.text(entry, place, "stream");
      for (const json& block : reader.array(entry, place, "blocks")) {
        skip.blocks.push_back(reader.integer(block, place + ".blocks", 0, kMaxBlocks));
      }
    }
    const json& reads = reader.object(stages[i], path, "reads", true);
    for (const auto& [name, entry] : reads.items()) {
      std::vector<std::string>& values = stage.reads[name];
      for (const json& value : reader.array(reads, path + ".reads", name.c_str())) {
        values.push_back(value.is_string() ? value.get<std::string>() : std::string());
      }
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

void read_contents(FieldReader& reader, const json& data, Manifest& manifest) {
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
    sampler.latents = reader.text(samplers[i], path, "latents", kLatents);
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

std::vector<std::string> Manifest::latents() const {
  std::vector<std::string> found;
  for (const auto& [name, input] : inputs) {
    if (input.runs != "step") continue;
    found.insert(name == kLatents ? found.begin() : found.end(), name);
  }
  return found;
}

std::vector<std::string> Manifest::cached() const {
  std::vector<std::string> found;
  const auto reuse = graphs.find("reuse");
  if (reuse == graphs.end()) return found;
  for (const auto& [name, io] : reuse->second.outputs) {
    const std::string stream = stream_of(name);
    if (!stream.empty()) found.insert(stream == kHidden ? found.begin() : found.end(), stream);
  }
  return found;
}

const Io* Manifest::row_of(const std::string& table) const {
  std::set<std::string> names{table};
  for (const StageEntry& stage : stages) {
    for (const auto& [name, values] : stage.reads) {
      if (std::find(values.begin(), values.end(), table) != values.end()) names.insert(name);
    }
  }
  for (const auto& [graph_name, graph] : graphs) {
    if (graph.runs == "run_block") continue;  // takes the whole table
    for (const std::string& name : names) {
      const auto input = graph.inputs.find(name);
      if (input != graph.inputs.end()) return &input->second;
    }
  }
  return nullptr;
}

bool Manifest::reads_prompt(const std::string& modulation) const {
  std::set<std::string> read;
  for (const auto& [name, io] : graphs.at(modulation).inputs) read.insert(name);
  for (const StageEntry& stage : stages) {
    if (stage.modulation != modulation) continue;
    for (const auto& [name, values] : stage.reads) {
      if (read.count(name) != 0) read.insert(values.begin(), values.end());
    }
  }
  return std::any_of(read.begin(), read.end(), [&](const std::string& name) {
    const auto input = inputs.find(name);
    if (input != inputs.end()) return input->second.runs == "prompt";
    return std::any_of(graphs.begin(), graphs.end(), [&](const auto& graph) {
      return graph.second.runs == "prompt" && graph.second.outputs.count(name) != 0;
    });
  });
}

Result<Manifest> Manifest::parse(const std::string& text, const std::string& where) {
  FREEWHEEL_ASSIGN(const json data, parse_json(text, where, "build the bundle again"));
  FieldReader reader;
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

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "manifest_checks.h"

#include <algorithm>
#include <set>
#include <utility>

#include "streams.h"

namespace freewheel {
namespace {

/// Checks that blocks read for themselves what is given before they run.
void check_reads(FieldReader& reader, const Manifest& manifest) {
  std::set<std::string> given;
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.runs != "shape" && graph.runs != "prompt" && graph.runs != "run") continue;
    for (const auto& [output, io] : graph.outputs) given.insert(output);
  }
  for (const auto& [name, input] : manifest.inputs) {
    if (input.runs == "prompt") given.insert(name);
  }
  for (std::size_t i = 0; i < manifest.stages.size(); ++i) {
    const StageEntry& stage = manifest.stages[i];
    const auto takes = [&](const std::string& graph, const std::string& name) {
      const auto found = manifest.graphs.find(graph);
      return found != manifest.graphs.end() && found->second.inputs.count(name) != 0;
    };
    for (const auto& [name, values] : stage.reads) {
      const std::string path = "stages." + std::to_string(i) + ".reads." + name;
      if (static_cast<std::int64_t>(values.size()) != stage.count) {
        reader.fault(path, "names " + std::to_string(values.size()) + " values for " +
                               std::to_string(stage.count) + " blocks");
      }
      if (!takes(stage.block, name) && !takes(stage.context.value_or(""), name) &&
          !takes(stage.modulation.value_or(""), name)) {
        reader.fault(path, "is no input of the stage's graphs");
      }
      for (const std::string& value : values) {
        if (given.count(value) == 0) {
          reader.fault(path, "names '" + value + "', which nothing gives before the blocks");
        }
      }
    }
  }
}

/// Checks that what blocks make of the timesteps is read by their graphs, and made of what is given
/// before the steps.
void check_modulation(FieldReader& reader, const Manifest& manifest) {
  std::set<std::string> given;
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.runs != "prompt" && graph.runs != "run") continue;
    for (const auto& [output, io] : graph.outputs) given.insert(output);
  }
  for (const auto& [name, input] : manifest.inputs) {
    if (input.runs == "prompt") given.insert(name);
  }
  for (std::size_t i = 0; i < manifest.stages.size(); ++i) {
    const StageEntry& stage = manifest.stages[i];
    const auto graph = manifest.graphs.find(stage.modulation.value_or(""));
    const auto block = manifest.graphs.find(stage.block);
    if (graph == manifest.graphs.end() || block == manifest.graphs.end()) continue;
    const std::string path = "stages." + std::to_string(i) + ".modulation";
    if (graph->second.runs != "run_block") {
      reader.fault(path, "runs as '" + graph->second.runs + "', not as 'run_block'");
    }
    if (graph->second.inputs.empty()) reader.fault(path, "takes no table");
    for (const auto& [name, io] : graph->second.outputs) {
      if (block->second.inputs.count(name) == 0) {
        reader.fault(path, "gives '" + name + "', which the stage's block does not take");
      }
    }
    for (const auto& [name, io] : graph->second.inputs) {
      if (io.shape.empty()) reader.fault(path, "takes '" + name + "', which has no rows");
      if (stage.reads.count(name) == 0 && given.count(name) == 0) {
        reader.fault(path, "takes '" + name + "', which nothing gives before the steps");
      }
    }
  }
}

/// Checks that each skip connection reads what a block of an earlier stage gives.
void check_skips(FieldReader& reader, const Manifest& manifest) {
  // Of each place in earlier stages: the graph that makes what is left there, and how its outputs'
  // names end.
  std::vector<std::pair<std::string, std::string>> makers;
  for (std::size_t i = 0; i < manifest.stages.size(); ++i) {
    const StageEntry& stage = manifest.stages[i];
    for (const auto& [name, skip] : stage.skips) {
      const std::string path = "stages." + std::to_string(i) + ".skips." + name;
      if (static_cast<std::int64_t>(skip.blocks.size()) != stage.count) {
        reader.fault(path, "names " + std::to_string(skip.blocks.size()) + " blocks for " +
                               std::to_string(stage.count));
      }
      for (const std::int64_t place : skip.blocks) {
        const auto at = static_cast<std::size_t>(place);
        const auto maker =
            at < makers.size() ? manifest.graphs.find(makers[at].first) : manifest.graphs.end();
        if (maker == manifest.graphs.end() ||
            maker->second.outputs.count(skip.stream + "_out" + makers[at].second) == 0) {
          reader.fault(path, "reads '" + skip.stream + "' of block " + std::to_string(place) +
                                 ", which gives none before");
        }
      }
    }
    if (makers.size() >= kMaxBlocks) continue;
    for (const GroupEntry& group : stage.groups) {
      const std::int64_t end = std::min(group.first + group.count, stage.first + stage.count);
      for (std::int64_t block = group.first; block < end && makers.size() < kMaxBlocks; ++block) {
        makers.emplace_back(group.graph, "." + std::to_string(block));
      }
    }
    if (stage.groups.empty()) {
      makers.insert(makers.end(), static_cast<std::size_t>(stage.count), {stage.block, ""});
    }
  }
}

/// Checks that each of the things that a model samples has its output, and each cached stream its
/// residual and its history.
void check_streams(FieldReader& reader, const Manifest& manifest) {
  const auto lacks = [&](const char* graph, const char* where, const std::string& name) {
    const auto found = manifest.graphs.find(graph);
    if (found == manifest.graphs.end()) return;  // which is a fault of its own
    const bool is_input = std::string(where) == "inputs";
    const auto& values = is_input ? found->second.inputs : found->second.outputs;
    if (values.count(name) != 0) return;
    reader.fault(std::string("graphs.") + graph + "." + where, "lack '" + name + "'");
  };
  const std::vector<std::string> latents = manifest.latents();
  if (latents.empty() || latents.front() != kLatents) {
    reader.fault("inputs", std::string("lack '") + kLatents + "'");
  }
  for (const std::string& name : latents) {
    lacks("finish", "outputs", beside(name, kLatents, kModelOutput));
  }
  const std::vector<std::string> cached = manifest.cached();
  if (cached.empty() || cached.front() != kHidden) {
    lacks("reuse", "outputs", std::string(kHidden) + kOut);
  }
  for (const std::string& stream : cached) {
    lacks("head", "outputs", stream);
    lacks("delta", "outputs", beside(stream, kHidden, kResidual));
    lacks("reuse", "inputs", beside(stream, kHidden, kHistory));
  }
}

}  // namespace

void check_references(FieldReader& reader, const Manifest& manifest) {
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
    if (stage.modulation) wants_graph(path + ".modulation", *stage.modulation);
    if (stage.tapped) wants_graph(path + ".tapped", *stage.tapped);
    for (const GroupEntry& group : stage.groups) wants_graph(path + ".groups", group.graph);
  }
  check_reads(reader, manifest);
  check_modulation(reader, manifest);
  check_skips(reader, manifest);
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
  check_streams(reader, manifest);
  if (has_graph("text_encoder") && !manifest.vocabulary_size) {
    reader.fault("vocabulary_size", "is missing, and there is a text encoder");
  }
  if (manifest.tokenizer && !has_graph("text_encoder")) {
    reader.fault("tokenizer", "is there, and no text encoder");
  }
  if (manifest.tokenizer && manifest.files.count(manifest.tokenizer->file) == 0) {
    reader.fault("tokenizer.file", "'" + manifest.tokenizer->file + "' is not among the files");
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

}  // namespace freewheel

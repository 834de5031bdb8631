// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The manifest of a bundle as types; docs/reference/bundle.md specifies every field.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "freewheel/policy_spec.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

inline constexpr int kSchemaVersion = 2;

/// Sizes of the named dimensions.
using Dims = std::map<std::string, std::int64_t>;

/// A graph input or output: fixed sizes and named dimensions.
struct Io {
  using Dim = std::variant<std::int64_t, std::string>;
  DType dtype = DType::kFloat32;
  std::vector<Dim> shape;

  /// "[batch, 16, frames]".
  std::string text() const;
};

struct FileEntry {
  std::int64_t bytes = 0;
  std::string sha256;
};

struct TensorEntry {
  std::string file;
  DType dtype = DType::kFloat32;
  Shape shape;
  std::int64_t offset = 0, bytes = 0;
};

struct GraphEntry {
  std::string file, runs, precision;
  std::map<std::string, Io> inputs, outputs;
  std::map<std::string, std::string> weights;
};

/// Consecutive blocks compiled as one graph, with their weights inside.
struct GroupEntry {
  std::string graph;
  std::int64_t first = 0, count = 0;
};

/// What each block of a stage reads of a block of an earlier stage.
struct SkipEntry {
  std::string stream;                ///< The maker gives it as `<stream>_out`.
  std::vector<std::int64_t> blocks;  ///< The maker's place in the loop, for each block.
};

struct StageEntry {
  std::string block;
  std::optional<std::string> context, modulation, tapped;
  std::int64_t first = 0, count = 0;
  std::vector<GroupEntry> groups;  ///< Empty where weights are inputs.
  std::map<std::string, SkipEntry> skips;
  /// Input of `block`, `context` or `modulation` -> the value that each block reads there, by name.
  std::map<std::string, std::vector<std::string>> reads;
};

/// One of several transformers of equal config, which share every graph and engine.
struct ExpertEntry {
  std::string part;            ///< Folder of the pipeline.
  std::string prefix;          ///< Before the names of its tensors, where graphs say `weights`.
  double from_timestep = 0.0;  ///< It denoises from here on, up to where the one before begins.
};

struct InputEntry : Io {
  std::string argument, runs;
  std::vector<std::string> of;  ///< Of a timestep: whose it is; of a vector of them: whose each is.
};

struct SignalEntry {
  std::string value;
  bool is_known_per_run = false;
};

struct PolicyEntry {
  std::string graph;
  PolicySpec spec;
  CacheSetting setting;  ///< What a request gets that names the policy and no config.
};

/// What one latent stands for: frames after the first, and pixels along height and width.
struct LatentScale {
  std::int64_t frames = 1, pixels = 1;
};

/// What a run gets where its request says nothing, beside caching.
struct GenerationDefaults {
  std::int64_t steps = 0, height = 0, width = 0, frames = 0, seed = 0, text_tokens = 0;
  double guidance_scale = 1.0, flow_shift = 1.0;
  std::optional<double> guidance_scale_2;  ///< Of the second expert; none is that of the first.
  std::string sampler;                     ///< Empty is the pipeline's own.
};

struct ConfigEntry {
  CacheSetting cache;
  GenerationDefaults generation;
};

struct EngineSet {
  std::string backend, target;
  std::map<std::string, std::string> files;
};

struct SamplerEntry {
  std::string name, scheduler, file;
  std::string latents;  ///< Whose it is, where some beside the first have schedules of their own.
  double flow_shift = 1.0;
  std::int64_t window = 1;
  std::vector<std::int64_t> steps;
};

/// What a dimension is a sum of: `dim` rounded up to a multiple of `number`; without a `dim`,
/// `number`.
struct SumTerm {
  std::string dim;
  std::int64_t number = 1;
};

/// The largest size of a dimension, and what of the model ends there: module and source line.
struct LimitEntry {
  std::int64_t most = 0;
  std::string where;
};

/// The pipeline's tokenizer as a graph of OpenVINO's.
struct TokenizerEntry {
  std::string file;                     ///< Its .xml; the .bin lies beside it.
  std::optional<std::int64_t> unknown;  ///< Id that a text must not give: the graph can't tell.
};

struct Manifest {
  std::string freewheel_version, family, precision, weights;
  std::string checkpoint_sha256;  ///< Digest of the weights that it was built from.
  std::map<std::string, InputEntry> inputs;
  std::map<std::string, std::vector<std::pair<std::string, std::int64_t>>> dims;
  std::map<std::string, std::vector<SumTerm>> sums;
  std::map<std::string, LimitEntry> limits;
  LatentScale latent_scale;
  std::optional<std::int64_t> vocabulary_size;  ///< Of the text encoder: ids lie below it.
  std::optional<TokenizerEntry> tokenizer;
  std::map<std::string, GraphEntry> graphs;
  std::vector<StageEntry> stages;
  std::vector<ExpertEntry> experts;  ///< Empty where the graphs serve one transformer.
  std::map<std::string, SignalEntry> signals;
  std::int64_t feature_block = 0;
  DType history_dtype = DType::kFloat32;
  std::map<std::string, PolicyEntry> policies;
  std::map<std::string, ConfigEntry> configs;
  std::string default_config;
  std::map<std::string, TensorEntry> tensors;
  std::vector<EngineSet> engines;
  std::vector<SamplerEntry> samplers;
  std::map<std::string, FileEntry> files;

  /// What the model samples: its inputs that change at every step, `latents` first.
  std::vector<std::string> latents() const;

  /// The streams whose residuals are kept, `hidden` first.
  std::vector<std::string> cached() const;

  /// A table's row as graphs read it; null where policies alone look at the table.
  const Io* row_of(const std::string& table) const;

  /// Whether what a stage's `modulation` makes is another for each prompt.
  bool reads_prompt(const std::string& modulation) const;

  /// Parses and checks a manifest's text. Reports all its faults in one status.
  /// @param where What to call the file in messages.
  static Result<Manifest> parse(const std::string& text, const std::string& where);
};

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "body.h"

#include <algorithm>

#include "freewheel/dims.h"
#include "streams.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kFeature[] = "attention_output";

/// Adds the prompt's own dimensions to the latents'; they must agree.
Status add_prompt_dims(const Manifest& manifest, const std::string& branch, const Tensors& prompt,
                       Dims& dims) {
  const Dims latents = dims;
  for (const auto& [name, tensor] : prompt) {
    FREEWHEEL_ASSIGN(const Dims found, match_dims(name, manifest.inputs.at(name), tensor.shape));
    for (const auto& [dim, size] : found) {
      const auto known = latents.find(dim);
      if (known != latents.end() && known->second != size) {
        return Status(Code::kRequest, "branch '" + branch + "', input '" + name + "'",
                      "has " + dim + " " + std::to_string(size) + ", the latents have " +
                          std::to_string(known->second),
                      "give one prompt per batch element");
      }
      dims[dim] = size;
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Body>> Body::create(Model& model, std::size_t expert,
                                           const std::string& branch, const Tensors& shared,
                                           const Tensors& prompt, const Dims& dims,
                                           const BlockTables& tables) {
  auto body = std::make_unique<Body>();
  const Manifest& manifest = model.manifest();
  Memory& memory = model.memory();
  body->model_ = &model;
  body->expert_ = expert;
  body->dims_ = dims;
  FREEWHEEL_TRY(add_prompt_dims(manifest, branch, prompt, body->dims_));
  FREEWHEEL_ASSIGN(body->dims_, derive_dims(manifest, body->dims_));
  FREEWHEEL_ASSIGN(body->tables_,
                   BlockTables::create(model, expert, body->dims_, /*by_prompt=*/true));
  for (const auto& [name, tensor] : prompt) {
    FREEWHEEL_TRY(body->buffers_.allocate(memory, name, manifest.inputs.at(name), body->dims_,
                                          body->prompt_));
  }
  Tensors context = shared;
  context.insert(body->prompt_.begin(), body->prompt_.end());
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.runs != "prompt") continue;
    FREEWHEEL_TRY(body->buffers_.allocate(memory, graph.outputs, body->dims_, context));
  }
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.runs != "prompt") continue;
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, body->bind(name, context));
    body->prompt_calls_.push_back(std::move(call));
  }
  body->cached_ = manifest.cached();
  for (const std::string& stream : body->cached_) {
    body->streams_[stream] = {shared.at(stream), shared.at(stream + "_even"),
                              shared.at(stream + "_odd")};
  }
  body->values_ = std::move(context);
  for (const StageEntry& stage : manifest.stages) {
    for (const auto& [name, skip] : stage.skips) {
      for (const std::int64_t place : skip.blocks) body->wanted_.insert({skip.stream, place});
    }
  }
  for (std::size_t index = 0; index < manifest.stages.size(); ++index) {
    FREEWHEEL_TRY(body->bind_stage(index, tables));
  }
  return body;
}

Status Body::bind_stage(std::size_t index, const BlockTables& tables) {
  const StageEntry& stage = model_->manifest().stages[index];
  const bool is_first =
      first_.empty() && model_->manifest().graphs.at(stage.block).outputs.count("hidden_out") != 0;
  const std::int64_t place_of_0 = blocks_before_ - stage.first;
  blocks_before_ += stage.count;
  // What each block alone reads, named with its index for groups.
  Tensors grouped = values_;
  for (std::int64_t block = stage.first; block < stage.first + stage.count; ++block) {
    Tensors own;
    for (const auto& [name, read] : stage.reads) {
      own[name] = values_.at(read[static_cast<std::size_t>(block - stage.first)]);
    }
    for (const BlockTables* made : {&tables, static_cast<const BlockTables*>(tables_.get())}) {
      for (const auto& [name, row] : made->rows(index, block)) own[name] = row;
    }
    if (is_first && block == stage.first) first_ = own;
    Tensors values = values_;
    for (const auto& [name, tensor] : own) {
      grouped[name + "." + std::to_string(block)] = values[name] = tensor;
    }
    if (stage.context) {
      const auto& outputs = model_->manifest().graphs.at(*stage.context).outputs;
      FREEWHEEL_TRY(buffers_.allocate(model_->memory(), outputs, dims_, values));
      FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, bind(*stage.context, values, block));
      prompt_calls_.push_back(std::move(call));
      for (const auto& [name, io] : outputs) {
        grouped[name + "." + std::to_string(block)] = values.at(name);
      }
    }
    for (const auto& [name, skip] : stage.skips) {
      const std::int64_t maker = skip.blocks[static_cast<std::size_t>(block - stage.first)];
      grouped[name + "." + std::to_string(block)] = values[name] = kept_.at({skip.stream, maker});
    }
    if (stage.groups.empty()) {
      FREEWHEEL_TRY(
          add_call(stage.block, block, 1, std::move(values), stage.tapped, place_of_0 + block));
    }
  }
  for (const GroupEntry& group : stage.groups) {
    Tensors values = grouped;
    const auto& outputs = model_->manifest().graphs.at(group.graph).outputs;
    for (const auto& [stream, place] : wanted_) {
      const std::int64_t block = place - place_of_0;
      if (block < group.first || block >= group.first + group.count) continue;
      const std::string name = stream + kOut + "." + std::to_string(block);
      const auto io = outputs.find(name);
      if (io != outputs.end()) FREEWHEEL_TRY(keep(stream, place, io->second, values[name]));
    }
    FREEWHEEL_TRY(add_call(group.graph, group.first, group.count, std::move(values), group.graph));
  }
  return {};
}

/// Moves a stream on to the one of its two buffers that does not hold it now.
Status Body::advance(const std::string& stream, const Io& io, Tensor& target) {
  Stream& known = streams_[stream];
  if (known.even.data == nullptr) {
    Tensors made;
    for (Tensor* buffer : {&known.even, &known.odd}) {
      FREEWHEEL_TRY(buffers_.allocate(model_->memory(), stream, io, dims_, made));
      *buffer = made.at(stream);
    }
  }
  known.now = known.now.data == known.even.data ? known.odd : known.even;
  target = known.now;
  return {};
}

/// Makes the buffer of what a block at a place in the loop leaves for a later stage.
Status Body::keep(const std::string& stream, std::int64_t place, const Io& io, Tensor& target) {
  Tensors made;
  FREEWHEEL_TRY(buffers_.allocate(model_->memory(), stream, io, dims_, made));
  target = kept_[{stream, place}] = made.at(stream);
  return {};
}

/// Binds the next call of the body to the streams as the one before leaves them; at a place in the
/// loop whose result a later stage reads, that is kept.
Status Body::add_call(const std::string& graph, std::int64_t first, std::int64_t count,
                      Tensors values, const std::optional<std::string>& tapped,
                      std::optional<std::int64_t> place) {
  for (const auto& [name, stream] : streams_) values[name] = stream.now;
  const GraphEntry& entry = model_->manifest().graphs.at(graph);
  const auto& outputs = entry.outputs;
  for (const auto& [name, io] : outputs) {
    const std::string stream = stream_of(name);
    if (stream.empty()) continue;
    if (place && wanted_.count({stream, *place}) != 0) {
      FREEWHEEL_TRY(keep(stream, *place, io, values[name]));
      streams_[stream].now = values[name];
    } else {
      FREEWHEEL_TRY(advance(stream, io, values[name]));
    }
  }
  const auto feature = outputs.find(kFeature);
  if (feature != outputs.end()) {  // a group writes its feature on every run, wanted or not
    FREEWHEEL_TRY(buffers_.allocate(model_->memory(), kFeature, feature->second, dims_, values));
  }
  Call call{graph, first, values, std::move(values), nullptr};
  FREEWHEEL_ASSIGN(call.bound, bind(graph, call.values, first));
  const std::int64_t wanted = model_->manifest().feature_block;
  if (tapped && wanted >= first && wanted < first + count) {
    tapped_graph_ = *tapped;
    tapped_at_ = calls_.size();
  }
  calls_.push_back(std::move(call));
  return {};
}

Status Body::set_prompt(const Tensors& prompt) {
  for (const auto& [name, tensor] : prompt) {
    FREEWHEEL_TRY(model_->memory().upload(prompt_.at(name).data, tensor.data, tensor.bytes()));
  }
  for (const auto& call : prompt_calls_) FREEWHEEL_TRY(call->run());
  forget_tables();
  return model_->memory().synchronize();
}

Status Body::modulate(const Tensors& tables, std::int64_t steps) {
  if (is_modulated_) return {};
  FREEWHEEL_TRY(tables_->compute(tables, steps, values_));
  is_modulated_ = true;
  row_ = -1;
  return {};
}

Status Body::select_row(std::int64_t step_index) noexcept {
  if (step_index == row_) return {};
  FREEWHEEL_TRY(tables_->select(step_index));
  row_ = step_index;
  return {};
}

bool Body::fits(const Tensors& prompt) const {
  for (const auto& [name, tensor] : prompt) {
    if (prompt_.at(name).shape != tensor.shape) return false;
  }
  return true;
}

Status Body::bind_taps() {
  if (!taps_.empty()) return {};
  if (tapped_graph_.empty()) {
    return Status(Code::kBundle, "stages", "tap no feature, which this policy looks at",
                  "choose a policy without a feature");
  }
  const GraphEntry& graph = model_->manifest().graphs.at(tapped_graph_);
  const auto feature = graph.outputs.find(kFeature);
  if (feature == graph.outputs.end()) {
    return Status(Code::kBundle, "graph '" + tapped_graph_ + "'", "does not output the feature",
                  "build the bundle again");
  }
  std::vector<Tensor> taps;
  for (int turn = 0; turn < 2; ++turn) {
    Tensors made;
    FREEWHEEL_TRY(buffers_.allocate(model_->memory(), kFeature, feature->second, dims_, made));
    taps.push_back(made.at(kFeature));
  }
  taps_ = std::move(taps);
  return bind_tapped();
}

Status Body::bind_tapped() {
  tapped_.clear();
  const Call& call = calls_[tapped_at_];
  for (const Tensor& tap : taps_) {
    Tensors values = call.values;
    values[kFeature] = tap;
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> bound, bind(tapped_graph_, values, call.block));
    tapped_.push_back(std::move(bound));
  }
  return {};
}

/// Where a stream lies before a call, in a buffer that no call from there on writes.
Result<Tensor> Body::leave(const std::string& stream, std::size_t at, Division& division) const {
  std::vector<std::size_t> writers;
  for (std::size_t i = 0; i < calls_.size(); ++i) {
    const auto& outputs = model_->manifest().graphs.at(calls_[i].graph).outputs;
    if (outputs.count(stream + kOut) != 0) writers.push_back(i);
  }
  const auto following = std::lower_bound(writers.begin(), writers.end(), at);
  if (following == writers.begin()) {  // as `head` or `prompt` gave it, if it does not begin later
    const Tensors& values = division.values[writers.front()];
    const auto begun = values.find(stream);
    return begun != values.end() ? begun->second : values.at(stream + kOut);
  }
  const std::size_t writer = *(following - 1);
  const Tensor written = division.values[writer].at(stream + kOut);
  const bool is_kept = std::any_of(kept_.begin(), kept_.end(), [&](const auto& entry) {
    return entry.second.data == written.data;
  });
  if (following == writers.end() || is_kept) return written;
  const auto known = division.left.find({stream, writer});
  if (known != division.left.end()) return known->second;
  Tensors made;
  const Io& io = model_->manifest().graphs.at(calls_[writer].graph).outputs.at(stream + kOut);
  FREEWHEEL_TRY(division.buffers.allocate(model_->memory(), stream, io, dims_, made));
  const Tensor own = made.at(stream);
  division.values[writer][stream + kOut] = own;
  division.bound.insert(writer);
  for (std::size_t i = writer + 1; i <= *following; ++i) {
    division.values[i][stream] = own;
    division.bound.insert(i);
  }
  division.left[{stream, writer}] = own;
  return own;
}

Status Body::divide(const Sections& sections) {
  if (sections_ && *sections_ == sections) return {};
  Division division;
  for (const Call& call : calls_) division.values.push_back(call.undivided);
  Tensors before, after;
  for (const auto& [stream, now] : streams_) {
    FREEWHEEL_ASSIGN(before[stream], leave(stream, sections.begin, division));
    FREEWHEEL_ASSIGN(after[stream], leave(stream, sections.end, division));
  }
  std::set<std::size_t> changed = division.bound;
  changed.insert(rebound_.begin(), rebound_.end());
  std::map<std::size_t, std::unique_ptr<BoundCall>> bound;
  for (const std::size_t i : changed) {
    FREEWHEEL_ASSIGN(bound[i], bind(calls_[i].graph, division.values[i], calls_[i].block));
  }
  for (auto& [i, call] : bound) {
    calls_[i].values = std::move(division.values[i]);
    calls_[i].bound = std::move(call);
  }
  section_buffers_ = std::move(division.buffers);
  rebound_ = std::move(division.bound);
  before_ = std::move(before);
  after_ = std::move(after);
  sections_ = sections;
  return taps_.empty() ? Status() : bind_tapped();
}

bool Body::is_finite() const noexcept {
  return std::all_of(cached_.begin(), cached_.end(), [&](const std::string& stream) {
    return freewheel::is_finite(result(stream));
  });
}

Status Body::run(int tap, const Cancellation& cancellation, std::size_t first,
                 std::size_t end) noexcept {
  for (std::size_t at = first; at < end; ++at) {
    if (cancellation.is_wanted()) return cancelled();
    const bool is_tapped = tap >= 0 && at == tapped_at_;
    FREEWHEEL_TRY((is_tapped ? tapped_[static_cast<std::size_t>(tap)] : calls_[at].bound)->run());
  }
  return {};
}

}  // namespace freewheel

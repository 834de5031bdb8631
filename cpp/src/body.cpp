// SPDX-License-Identifier: Apache-2.0
#include "body.h"

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

Status BufferSet::allocate(Memory& memory, const std::string& name, const Io& io, const Dims& dims,
                           Tensors& views) {
  FREEWHEEL_ASSIGN(const Shape shape, shape_of(name, io, dims));
  FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(memory, io.dtype, shape));
  views[name] = buffer.view();
  buffers_.push_back(std::move(buffer));
  return {};
}

Status BufferSet::allocate(Memory& memory, const std::map<std::string, Io>& entries,
                           const Dims& dims, Tensors& views) {
  for (const auto& [name, io] : entries) FREEWHEEL_TRY(allocate(memory, name, io, dims, views));
  return {};
}

Result<std::unique_ptr<Body>> Body::create(Model& model, const std::string& branch,
                                           const Tensors& shared, const Tensors& prompt,
                                           const Dims& dims) {
  auto body = std::make_unique<Body>();
  const Manifest& manifest = model.manifest();
  Memory& memory = model.memory();
  body->model_ = &model;
  body->dims_ = dims;
  FREEWHEEL_TRY(add_prompt_dims(manifest, branch, prompt, body->dims_));
  for (const auto& [name, tensor] : prompt) {
    FREEWHEEL_TRY(body->buffers_.allocate(memory, name, manifest.inputs.at(name), body->dims_,
                                          body->prompt_));
  }
  Tensors context = body->prompt_;
  FREEWHEEL_TRY(
      body->buffers_.allocate(memory, manifest.graphs.at("prompt").outputs, body->dims_, context));
  FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> prompt_call, model.bind("prompt", context));
  body->prompt_calls_.push_back(std::move(prompt_call));
  Tensor source = shared.at("hidden");
  const Tensor even = shared.at("hidden_even"), odd = shared.at("hidden_odd");
  for (const StageEntry& stage : manifest.stages) {
    for (std::int64_t block = stage.first; block < stage.first + stage.count; ++block) {
      Tensors values = shared;
      for (const auto& [name, tensor] : context) values[name] = tensor;
      if (stage.context) {
        FREEWHEEL_TRY(body->buffers_.allocate(memory, manifest.graphs.at(*stage.context).outputs,
                                              body->dims_, values));
        FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call,
                         model.bind(*stage.context, values, block));
        body->prompt_calls_.push_back(std::move(call));
      }
      values["hidden"] = source;
      values["hidden_out"] = source.data == even.data ? odd : even;
      if (block == manifest.feature_block && stage.tapped) {
        body->tapped_graph_ = *stage.tapped;
        body->tapped_block_ = block;
        body->tapped_at_ = body->blocks_.size();
        body->tapped_values_ = values;
      }
      FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, model.bind(stage.block, values, block));
      body->blocks_.push_back(std::move(call));
      source = values["hidden_out"];
    }
  }
  body->hidden_out_ = source;
  return body;
}

Status Body::set_prompt(const Tensors& prompt) {
  for (const auto& [name, tensor] : prompt) {
    FREEWHEEL_TRY(model_->memory().upload(prompt_.at(name).data, tensor.data, tensor.bytes()));
  }
  for (const auto& call : prompt_calls_) FREEWHEEL_TRY(call->run());
  return model_->memory().synchronize();
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
    FREEWHEEL_TRY(
        buffers_.allocate(model_->memory(), kFeature, feature->second, dims_, tapped_values_));
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call,
                     model_->bind(tapped_graph_, tapped_values_, tapped_block_));
    tapped_.push_back(std::move(call));
    taps.push_back(tapped_values_.at(kFeature));
  }
  taps_ = std::move(taps);
  return {};
}

Status Body::run(int tap, const Cancellation& cancellation) noexcept {
  for (std::size_t block = 0; block < blocks_.size(); ++block) {
    if (cancellation.is_wanted()) return cancelled();
    const bool is_tapped = tap >= 0 && block == tapped_at_;
    FREEWHEEL_TRY((is_tapped ? tapped_[static_cast<std::size_t>(tap)] : blocks_[block])->run());
  }
  return {};
}

}  // namespace freewheel

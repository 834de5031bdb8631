// SPDX-License-Identifier: Apache-2.0
#include "branch_cache.h"

#include <algorithm>

#include "try.h"

namespace freewheel {
namespace {

/// A view with all leading dimensions flattened: [rows, width].
Tensor flattened(const Tensor& tensor) {
  const int rank = tensor.shape.rank();
  const std::int64_t width = rank > 0 ? tensor.shape[rank - 1] : 1;
  const std::int64_t rows = width > 0 ? tensor.shape.elements() / width : 0;
  return {tensor.data, tensor.dtype, Shape{rows, width}};
}

std::vector<std::string> keys_of(const std::map<std::string, PolicyEntry>& policies) {
  std::vector<std::string> names;
  for (const auto& [name, entry] : policies) names.push_back(name);
  return names;
}

}  // namespace

Result<ResolvedSetting> ResolvedSetting::create(const Manifest& manifest,
                                                const CacheSetting& setting) {
  ResolvedSetting resolved;
  resolved.setting = setting;
  const auto policy = manifest.policies.find(setting.policy);
  if (policy == manifest.policies.end()) {
    return Status(Code::kConfig, "policy '" + setting.policy + "'", "is not in the bundle",
                  nearest(setting.policy, keys_of(manifest.policies)));
  }
  resolved.policy = &policy->second;
  const PolicySpec& spec = policy->second.spec;
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

std::int64_t ResolvedSetting::depth() const {
  const HistorySpec& history = policy->spec.history;
  if (!history.parameter) return history.depth;
  const auto chosen = static_cast<std::int64_t>(parameters.at(*history.parameter).front());
  return std::clamp<std::int64_t>(chosen + history.offset, 0, history.maximum);
}

Result<std::unique_ptr<BranchCache>> BranchCache::create(Model& model,
                                                         const ResolvedSetting& resolved,
                                                         Body& body, const Tensors& shared,
                                                         const Dims& dims) {
  auto cache = std::make_unique<BranchCache>();
  cache->model_ = &model;
  cache->body_ = &body;
  cache->spec_ = &resolved.policy->spec;
  cache->signal_ = resolved.signal;
  cache->is_folded_ = resolved.is_folded();
  cache->depth_ = resolved.depth();
  cache->computed_steps_.reserve(static_cast<std::size_t>(cache->depth_ + 1));
  if (cache->spec_->wants_feature) FREEWHEEL_TRY(body.bind_taps());
  if (cache->depth_ > 0) FREEWHEEL_TRY(cache->bind_history(shared, dims));
  FREEWHEEL_TRY(cache->bind_signal(shared, dims));
  FREEWHEEL_ASSIGN(const std::vector<Tensors> arrangements, cache->arrangements(dims));
  FREEWHEEL_ASSIGN(cache->decider_, Decider::create(model, *resolved.policy, resolved.parameters,
                                                    resolved.setting.guard, arrangements));
  return cache;
}

Status BranchCache::bind_history(const Tensors& shared, const Dims& dims) {
  const auto& outputs = model_->manifest().graphs.at("delta").outputs;
  const auto residual = outputs.find("residual");
  if (residual == outputs.end()) {
    return Status(Code::kBundle, "graph 'delta'", "does not output 'residual'",
                  "build the bundle again");
  }
  FREEWHEEL_ASSIGN(const Shape shape, shape_of("residual", residual->second, dims));
  FREEWHEEL_ASSIGN(ring_,
                   ResidualRing::create(model_->memory(), depth_, residual->second.dtype, shape));
  Tensors values = {{"hidden", shared.at("hidden")}, {"hidden_out", body_->hidden_out()}};
  for (std::int64_t slot = 0; slot < depth_; ++slot) {
    values["residual"] = ring_.slot(slot);
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, model_->bind("delta", values));
    deltas_.push_back(std::move(call));
  }
  values["history"] = ring_.history();
  values["mix"] = ring_.mix();
  FREEWHEEL_ASSIGN(reuse_, model_->bind("reuse", values));
  return {};
}

Status BranchCache::bind_signal(const Tensors& shared, const Dims& dims) {
  if (signal_ == nullptr) return {};
  const Manifest& manifest = model_->manifest();
  if (signal_->is_known_per_run) {
    const auto row = shared.find(signal_->value);
    if (row == shared.end()) {
      return Status(Code::kBundle, "signal '" + signal_->value + "'", "is no per-run table",
                    "build the bundle again");
    }
    const std::int64_t width = row->second.shape.elements();
    Tensors views;
    Io io;
    io.dtype = row->second.dtype;
    io.shape = {std::int64_t{1}, width};
    for (int turn = 0; turn < 2; ++turn) {
      FREEWHEEL_TRY(buffers_.allocate(model_->memory(), "signal", io, {}, views));
      signals_.push_back(views.at("signal"));
    }
    return {};
  }
  for (const auto& [name, graph] : manifest.graphs) {
    const auto output = graph.outputs.find(signal_->value);
    if (graph.runs != "signal" || output == graph.outputs.end()) continue;
    for (int turn = 0; turn < 2; ++turn) {
      Tensors values = shared;
      FREEWHEEL_TRY(
          buffers_.allocate(model_->memory(), signal_->value, output->second, dims, values));
      FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, model_->bind(name, values));
      signal_calls_.push_back(std::move(call));
      signals_.push_back(flattened(values.at(signal_->value)));
    }
    return {};
  }
  return Status(Code::kBundle, "signal '" + signal_->value + "'", "is output by no graph",
                "build the bundle again");
}

Result<std::vector<Tensors>> BranchCache::arrangements(const Dims& dims) const {
  std::vector<Tensor> features;
  if (spec_->wants_feature) {
    const auto frame = dims.find("tokens_per_frame");
    for (const Tensor& tap : body_->taps()) {
      const std::int64_t tokens = tap.shape.rank() == 3 ? tap.shape[1] : 0;
      if (frame == dims.end() || frame->second <= 0 || tokens % frame->second != 0) {
        return Status(Code::kBundle, "dimension 'tokens_per_frame'",
                      "is not there, or does not divide the tokens", "build the bundle again");
      }
      features.push_back(
          {tap.data, tap.dtype, Shape{tokens / frame->second, frame->second, tap.shape[2]}});
    }
  }
  std::vector<Tensors> found;
  const std::size_t signal_turns = signal_calls_.empty() ? 1 : 2;
  const std::size_t feature_turns = features.empty() ? 1 : 2;
  for (std::size_t signal = 0; signal < signal_turns; ++signal) {
    for (std::size_t feature = 0; feature < feature_turns; ++feature) {
      Tensors values;
      if (!signals_.empty()) {
        values["signal"] = signals_[signal];
        values["previous_signal"] = signals_[1 - signal];
      }
      if (!features.empty()) {
        values["feature"] = features[feature];
        values["previous_feature"] = features[1 - feature];
      }
      found.push_back(std::move(values));
    }
  }
  return found;
}

Status BranchCache::reset(const Tensors& tables, std::int64_t step_count) {
  step_count_ = step_count;
  if (signal_ != nullptr && signal_->is_known_per_run) table_ = tables.at(signal_->value);
  FREEWHEEL_TRY(forget());
  folded_.clear();
  if (!is_folded_) return {};
  const auto size = static_cast<std::size_t>(decider_->mix_size());
  const auto steps = static_cast<std::size_t>(step_count);
  std::vector<Verdict> verdicts(steps);
  folded_mix_.assign(steps * size, 0.0f);
  for (std::size_t step = 0; step < steps; ++step) {
    const auto index = static_cast<std::int64_t>(step);
    FREEWHEEL_ASSIGN(verdicts[step], ask(index));
    float* kept = folded_mix_.data() + step * size;
    std::copy(verdicts[step].mix, verdicts[step].mix + size, kept);
    verdicts[step].mix = kept;
    if (verdicts[step].compute) note_computed(index);
  }
  FREEWHEEL_TRY(forget());
  folded_ = std::move(verdicts);
  return {};
}

Status BranchCache::forget() {
  Memory& memory = model_->memory();
  computed_steps_.clear();
  computed_count_ = 0;
  if (depth_ > 0) FREEWHEEL_TRY(ring_.reset());
  if (spec_->wants_feature) {
    for (const Tensor& tap : body_->taps()) FREEWHEEL_TRY(memory.zero(tap.data, tap.bytes()));
  }
  for (const Tensor& signal : signals_) FREEWHEEL_TRY(memory.zero(signal.data, signal.bytes()));
  decider_->reset(step_count_);
  return {};
}

Result<Verdict> BranchCache::decide(std::int64_t step_index) noexcept {
  if (!folded_.empty()) return folded_[static_cast<std::size_t>(step_index)];
  return ask(step_index);
}

Result<Verdict> BranchCache::ask(std::int64_t step_index) noexcept {
  std::size_t turn = 0;
  if (signal_ != nullptr && signal_->is_known_per_run) {
    Memory& memory = model_->memory();
    const std::size_t bytes = signals_[0].bytes();
    const std::uint8_t* row =
        table_.as<std::uint8_t>() + static_cast<std::size_t>(step_index) * bytes;
    FREEWHEEL_TRY(memory.copy(signals_[1].data, signals_[0].data, bytes));
    FREEWHEEL_TRY(memory.copy(signals_[0].data, row, bytes));
  } else if (signal_ != nullptr) {
    turn = static_cast<std::size_t>(step_index % 2);
    FREEWHEEL_TRY(signal_calls_[turn]->run());
  }
  if (spec_->wants_feature) turn = 2 * turn + static_cast<std::size_t>(last_tap());
  return decider_->decide(step_index, computed_steps_.data(),
                          static_cast<std::int64_t>(computed_steps_.size()), turn);
}

void BranchCache::note_computed(std::int64_t step_index) noexcept {
  ++computed_count_;
  if (depth_ == 0) return;
  if (static_cast<std::int64_t>(computed_steps_.size()) == depth_) computed_steps_.pop_back();
  computed_steps_.insert(computed_steps_.begin(), step_index);  // within the reserved capacity
}

Status BranchCache::compute(std::int64_t step_index, const Cancellation& cancellation) noexcept {
  note_computed(step_index);
  FREEWHEEL_TRY(body_->run(spec_->wants_feature ? last_tap() : -1, cancellation));
  if (depth_ == 0) return {};
  FREEWHEEL_TRY(deltas_[static_cast<std::size_t>(ring_.next_slot())]->run());
  ring_.push();
  return {};
}

Status BranchCache::reuse(const Verdict& verdict) noexcept {
  if (depth_ == 0) {
    return Status(Code::kInternal, "policy '" + spec_->name + "'",
                  "reuses though it keeps no residual", "report this with the bundle");
  }
  FREEWHEEL_TRY(ring_.set_mix(verdict.mix, decider_->mix_size()));
  return reuse_->run();
}

}  // namespace freewheel

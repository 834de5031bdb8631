// SPDX-License-Identifier: Apache-2.0
#include "branch_cache.h"

#include <algorithm>

#include "freewheel/dims.h"
#include "streams.h"
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

}  // namespace

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
  FREEWHEEL_TRY(cache->find_signal_graph());
  const Sections* sections = resolved.sections ? &*resolved.sections : nullptr;
  cache->is_divided_ = sections != nullptr;
  if (sections != nullptr) FREEWHEEL_TRY(body.divide(*sections));
  if (cache->depth_ > 0) FREEWHEEL_TRY(cache->bind_history(sections, shared));
  if (cache->spec_->keeps_gram) FREEWHEEL_TRY(cache->bind_gram());
  FREEWHEEL_TRY(cache->bind_signal(shared, dims));
  if (cache->spec_->wants_feature) FREEWHEEL_TRY(cache->bind_feature(dims));
  FREEWHEEL_ASSIGN(cache->decider_, Decider::create(model, *resolved.policy, resolved.parameters,
                                                    resolved.setting.guard, cache->arrangements()));
  return cache;
}

/// Finds what computes the signal, if a graph does.
Status BranchCache::find_signal_graph() {
  if (signal_ == nullptr || signal_->is_known_per_run) return {};
  const Manifest& manifest = model_->manifest();
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.runs != "probe" && graph.runs != "signal") continue;
    if (graph.outputs.count(signal_->value) == 0) continue;
    signal_graph_ = name;
    return {};
  }
  const auto input = manifest.inputs.find(signal_->value);
  if (input != manifest.inputs.end() && input->second.runs == "step") return {};
  return Status(Code::kBundle, "signal '" + signal_->value + "'", "is output by no graph",
                "build the bundle again");
}

/// Binds what keeps residuals: those of the whole body, or of the streams that the blocks between
/// the first and the last ones change.
Status BranchCache::bind_history(const Sections* sections, const Tensors& shared) {
  const auto& graphs = model_->manifest().graphs;
  const std::vector<std::string> begun = model_->manifest().cached();
  const std::vector<std::string>& streams = sections == nullptr ? begun : sections->streams;
  std::vector<std::string> ends = {""};  // streams that last blocks alone need have own graphs
  std::map<std::string, Shape> shapes;
  std::map<std::string, std::string> residuals;
  Tensors values;
  for (const std::string& stream : streams) {
    const bool is_begun = std::find(begun.begin(), begun.end(), stream) != begun.end();
    const std::string end = is_begun ? "" : "." + stream, residual = kept_name(stream, kResidual);
    const auto& outputs = graphs.at("delta" + end).outputs;
    const auto declared = outputs.find(residual);
    if (declared == outputs.end()) {
      return Status(Code::kBundle, "graph 'delta" + end + "'", "does not output '" + residual + "'",
                    "build the bundle again");
    }
    if (!is_begun) ends.push_back(end);
    residuals[stream] = residual;
    FREEWHEEL_ASSIGN(shapes[stream], shape_of(residual, declared->second, body_->dims()));
    values[stream] = sections == nullptr ? shared.at(stream) : body_->before(stream);
    values[stream + kOut] = sections == nullptr ? body_->result(stream) : body_->after(stream);
  }
  const DType dtype = graphs.at("delta").outputs.at(kResidual).dtype;
  FREEWHEEL_ASSIGN(ring_, ResidualRing::create(model_->memory(), depth_, dtype, shapes));
  const auto bind_each = [&](const char* graph, Calls& calls) -> Status {
    for (const std::string& end : ends) {
      FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, body_->bind(graph + end, values));
      calls.push_back(std::move(call));
    }
    return {};
  };
  deltas_.resize(static_cast<std::size_t>(depth_));
  for (std::int64_t slot = 0; slot < depth_; ++slot) {
    for (const auto& [stream, name] : residuals) values[name] = ring_.slot(stream, slot);
    FREEWHEEL_TRY(bind_each("delta", deltas_[static_cast<std::size_t>(slot)]));
  }
  for (const std::string& stream : streams) {
    values[kept_name(stream, kHistory)] = ring_.history(stream);
  }
  values["mix"] = ring_.mix();
  FREEWHEEL_TRY(bind_each("reuse", reuse_));
  return {};
}

/// Prepares the inner products of all slots; the manifest's reader saw that the graph is there and
/// that the policy keeps as many residuals as it mixes.
Status BranchCache::bind_gram() {
  Io square;
  square.shape = {depth_, depth_};
  for (const auto& [name, tensor] : {std::pair{"factors", &factors_}, {"gram", &gram_}}) {
    Tensors made;
    FREEWHEEL_TRY(buffers_.allocate(model_->memory(), name, square, {}, made));
    *tensor = made.at(name);
  }
  host_factors_.resize(static_cast<std::size_t>(depth_ * depth_));
  const Tensors values = {
      {kHistory, ring_.history(kHidden)}, {"factors", factors_}, {"gram", gram_}};
  FREEWHEEL_ASSIGN(gram_call_, body_->bind("gram", values));
  return {};
}

Status BranchCache::bind_signal(const Tensors& shared, const Dims& dims) {
  if (signal_ == nullptr) return {};
  roles_ = SignalBuffers(spec_->keeps_previous_signal, spec_->keeps_computed_signal,
                         spec_->keeps_older_signal);
  Memory& memory = model_->memory();
  if (signal_graph_.empty()) {
    const auto source = shared.find(signal_->value);
    if (source == shared.end() || source->second.dtype != DType::kFloat32) {
      return Status(Code::kBundle, "signal '" + signal_->value + "'",
                    "is no float32 table or input", "build the bundle again");
    }
    if (!signal_->is_known_per_run) source_ = source->second;
    const std::int64_t elements = source->second.shape.elements();
    Tensor flat = flattened(source->second);
    if (signal_->is_known_per_run) flat.shape = Shape{1, elements};
    for (std::size_t spot = 0; spot < roles_.count(); ++spot) {
      Tensors made;
      Io io;
      io.shape = {flat.shape[0], flat.shape[1]};
      FREEWHEEL_TRY(buffers_.allocate(memory, "signal", io, {}, made));
      signals_.push_back(made.at("signal"));
    }
    return {};
  }
  Tensors values = shared;
  for (const auto& [name, tensor] : body_->first()) values[name] = tensor;
  if (is_divided_) values["hidden_out"] = body_->before(kHidden);
  const Io& io = model_->manifest().graphs.at(signal_graph_).outputs.at(signal_->value);
  for (std::size_t spot = 0; spot < roles_.count(); ++spot) {
    FREEWHEEL_TRY(buffers_.allocate(memory, signal_->value, io, dims, values));
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, body_->bind(signal_graph_, values));
    signal_calls_.push_back(std::move(call));
    signals_.push_back(flattened(values.at(signal_->value)));
  }
  return {};
}

/// Gives the policy two features in turn, of batch element 0: the tapped one frame by frame, or the
/// model's output with all but its last two dimensions flattened.
Status BranchCache::bind_feature(const Dims& dims) {
  if (spec_->wants_model_output) {
    const Io& io = model_->manifest().graphs.at("finish").outputs.at("model_output");
    FREEWHEEL_ASSIGN(const Shape whole, shape_of("model_output", io, dims));
    const int rank = whole.rank();
    if (io.dtype != DType::kFloat32 || rank < 3 || whole.elements() == 0) {
      return Status(Code::kBundle, "tensor 'model_output'",
                    "is no float32 tensor of rank 3 or more",
                    "choose a policy without this feature");
    }
    const std::int64_t plane = whole[rank - 2] * whole[rank - 1];
    Io flat;
    flat.shape = {whole.elements() / whole[0] / plane, whole[rank - 2], whole[rank - 1]};
    for (int turn = 0; turn < 2; ++turn) {
      Tensors made;
      FREEWHEEL_TRY(buffers_.allocate(model_->memory(), "feature", flat, {}, made));
      features_.push_back(made.at("feature"));
    }
    return {};
  }
  FREEWHEEL_TRY(body_->bind_taps());
  const auto frame = dims.find("tokens_per_frame");
  for (const Tensor& tap : body_->taps()) {
    const std::int64_t tokens = tap.shape.rank() == 3 ? tap.shape[1] : 0;
    if (frame == dims.end() || frame->second <= 0 || tokens % frame->second != 0) {
      return Status(Code::kBundle, "dimension 'tokens_per_frame'",
                    "is not there, or does not divide the tokens", "build the bundle again");
    }
    features_.push_back(
        {tap.data, tap.dtype, Shape{tokens / frame->second, frame->second, tap.shape[2]}});
  }
  return {};
}

/// Every way in which rotating buffers can stand, features fastest; notes which stand is where.
std::vector<Tensors> BranchCache::arrangements() {
  std::vector<SignalBuffers::Stand> stands(1);
  if (!signals_.empty()) stands = roles_.stands();
  const std::size_t turns = features_.empty() ? 1 : features_.size();
  arrangement_of_.assign(SignalBuffers::kKeys, 0);
  std::vector<Tensors> found;
  for (const SignalBuffers::Stand& stand : stands) {
    arrangement_of_[SignalBuffers::key(stand)] = found.size();
    Tensors values;
    const std::pair<const char*, int> roles[] = {{"signal", stand.current},
                                                 {"previous_signal", stand.previous},
                                                 {"computed_signal", stand.computed},
                                                 {"older_signal", stand.older}};
    for (const auto& [role, buffer] : roles) {
      if (buffer >= 0) values[role] = signals_[static_cast<std::size_t>(buffer)];
    }
    if (gram_.data != nullptr) values["gram"] = gram_;
    for (std::size_t turn = 0; turn < turns; ++turn) {
      if (!features_.empty()) {
        values["feature"] = features_[turn];
        values["previous_feature"] = features_[1 - turn];
      }
      found.push_back(values);
    }
  }
  return found;
}

Status BranchCache::reset(const Tensors& tables, const Schedule& schedule) {
  schedule_ = &schedule;
  if (signal_ != nullptr && signal_->is_known_per_run) source_ = tables.at(signal_->value);
  return rejoin(0);
}

Status BranchCache::rejoin(std::int64_t first) {
  FREEWHEEL_TRY(forget());
  folded_.clear();
  first_ = first;
  if (!is_folded_) return {};
  const Cancellation never;
  const auto size = static_cast<std::size_t>(decider_->mix_size());
  const auto steps = static_cast<std::size_t>(schedule_->steps() - first);
  std::vector<DecisionRecord> decisions(steps);
  folded_mix_.assign(steps * size, 0.0f);
  for (std::size_t step = 0; step < steps; ++step) {
    const std::int64_t index = first + static_cast<std::int64_t>(step);
    FREEWHEEL_ASSIGN(decisions[step], ask(index, {}, never));
    float* kept = folded_mix_.data() + step * size;
    std::copy(decisions[step].mix, decisions[step].mix + size, kept);
    decisions[step].mix = kept;
    if (decisions[step].compute) note_computed(index);
  }
  FREEWHEEL_TRY(forget());
  folded_ = std::move(decisions);
  return {};
}

Status BranchCache::forget() {
  Memory& memory = model_->memory();
  computed_steps_.clear();
  computed_count_ = 0;
  if (depth_ > 0) FREEWHEEL_TRY(ring_.reset());
  for (const auto* tensors : {&features_, &signals_}) {
    for (const Tensor& tensor : *tensors) FREEWHEEL_TRY(memory.zero(tensor.data, tensor.bytes()));
  }
  if (gram_.data != nullptr) FREEWHEEL_TRY(memory.zero(gram_.data, gram_.bytes()));
  roles_.reset();
  decider_->reset(*schedule_);
  return {};
}

Result<DecisionRecord> BranchCache::decide(std::int64_t step_index, const Pace& pace,
                                           const Cancellation& cancellation) noexcept {
  if (!folded_.empty()) return folded_[static_cast<std::size_t>(step_index - first_)];
  return ask(step_index, pace, cancellation);
}

Result<DecisionRecord> BranchCache::ask(std::int64_t step_index, const Pace& pace,
                                        const Cancellation& cancellation) noexcept {
  std::size_t arrangement = 0;
  if (signal_ != nullptr) {
    FREEWHEEL_TRY(take_signal(step_index, cancellation));
    arrangement = arrangement_of_[SignalBuffers::key(roles_.stand())];
  }
  if (!features_.empty()) arrangement += static_cast<std::size_t>(last_feature());
  FREEWHEEL_ASSIGN(
      const DecisionRecord decision,
      decider_->decide(step_index, computed_steps_.data(),
                       static_cast<std::int64_t>(computed_steps_.size()), arrangement, pace));
  return affordable(decision);
}

DecisionRecord BranchCache::affordable(DecisionRecord decision) const noexcept {
  if (decision.compute) return decision;
  const auto size = static_cast<std::int64_t>(decider_->mix_size());
  for (auto age = static_cast<std::int64_t>(computed_steps_.size()); age < size; ++age) {
    decision.compute = decision.compute || decision.mix[age] != 0.0f;
  }
  return decision;
}

/// Writes this step's signal where nothing that is kept stands.
Status BranchCache::take_signal(std::int64_t step_index,
                                const Cancellation& cancellation) noexcept {
  const std::size_t spot = roles_.advance();
  if (!signal_graph_.empty()) {
    if (is_divided_) FREEWHEEL_TRY(body_->run_first(next_tap(), cancellation));
    return signal_calls_[spot]->run();
  }
  const std::size_t bytes = signals_[spot].bytes();
  const auto row = static_cast<std::size_t>(signal_->is_known_per_run ? step_index : 0);
  return model_->memory().copy(signals_[spot].data, source_.as<std::uint8_t>() + row * bytes,
                               bytes);
}

void BranchCache::note_computed(std::int64_t step_index) noexcept {
  ++computed_count_;
  roles_.mark_computed();
  if (depth_ == 0) return;
  if (static_cast<std::int64_t>(computed_steps_.size()) == depth_) computed_steps_.pop_back();
  computed_steps_.insert(computed_steps_.begin(), step_index);  // within the reserved capacity
}

Status BranchCache::compute(std::int64_t step_index, const Cancellation& cancellation) noexcept {
  const int tap = next_tap();
  note_computed(step_index);
  FREEWHEEL_TRY(is_divided_ ? body_->run_cached(tap, cancellation) : body_->run(tap, cancellation));
  if (depth_ > 0) {
    for (const auto& delta : deltas_[static_cast<std::size_t>(ring_.next_slot())]) {
      FREEWHEEL_TRY(delta->run());
    }
  }
  return is_divided_ ? body_->run_last(tap, cancellation) : Status();
}

Status BranchCache::keep() noexcept {
  if (depth_ == 0) return {};
  FREEWHEEL_TRY(ring_.push());
  if (gram_call_ == nullptr) return {};
  ring_.differences(host_factors_.data());
  FREEWHEEL_TRY(model_->memory().upload(factors_.data, host_factors_.data(), factors_.bytes()));
  return gram_call_->run();
}

Status BranchCache::keep_output(const Tensor& model_output) noexcept {
  if (!spec_->wants_model_output) return {};
  const Tensor& kept = features_[static_cast<std::size_t>(last_feature())];
  return model_->memory().copy(kept.data, model_output.data, kept.bytes());
}

Status BranchCache::reuse(const DecisionRecord& decision,
                          const Cancellation& cancellation) noexcept {
  if (depth_ == 0) {
    return Status(Code::kInternal, "policy '" + spec_->name + "'",
                  "reuses though it keeps no residual", "report this with the bundle");
  }
  FREEWHEEL_TRY(ring_.set_mix(decision.mix, decider_->mix_size()));
  for (const auto& call : reuse_) FREEWHEEL_TRY(call->run());
  return is_divided_ ? body_->run_last(/*tap=*/-1, cancellation) : Status();
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "decider.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "try.h"

namespace freewheel {
namespace {

std::map<std::string, Io> without(std::map<std::string, Io> ios, const Tensors& names) {
  for (const auto& [name, tensor] : names) ios.erase(name);
  return ios;
}

}  // namespace

Result<std::unique_ptr<Decider>> Decider::create(
    Model& model, const PolicyEntry& policy,
    const std::map<std::string, std::vector<double>>& parameters, const Guard& guard,
    const std::vector<Tensors>& arrangements) {
  auto decider = std::make_unique<Decider>();
  const GraphEntry& graph = model.manifest().graphs.at(policy.graph);
  decider->spec_ = &policy.spec;
  decider->memory_ = &model.memory();
  decider->exact_steps_ = guard.exact_steps;
  std::sort(decider->exact_steps_.begin(), decider->exact_steps_.end());
  FREEWHEEL_ASSIGN(
      decider->values_,
      SmallTensors::create(model.memory(), without(graph.inputs, arrangements[0]), graph.outputs));
  SmallTensors& values = decider->values_;
  for (const auto& [name, numbers] : parameters) values.set("param." + name, numbers);
  for (const auto& [name, limit] : guard.limits) {
    values.set("guard." + name, static_cast<double>(limit));
  }
  for (const Tensors& arrangement : arrangements) {
    Tensors bound = values.bound();
    bound.insert(arrangement.begin(), arrangement.end());
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> call, model.bind(policy.graph, bound));
    decider->calls_.push_back(std::move(call));
  }
  for (const auto& [name, io] : graph.outputs) {
    const std::string prefix = "new_";
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    const Tensor state = values.host(name.substr(prefix.size())), next = values.host(name);
    if (state.data == nullptr) continue;  // a state that the graph never reads
    if (state.bytes() != next.bytes()) {
      return Status(Code::kBundle, "graph '" + policy.graph + "', tensor '" + name + "'",
                    "is not of its state's size", "build the bundle again");
    }
    decider->carried_.push_back({state, next});
  }
  decider->step_index_ = values.host("step_index");
  decider->exact_ = values.host("exact");
  decider->computed_steps_ = values.host("computed_steps");
  decider->compute_ = values.host("compute");
  decider->mix_ = values.host("mix");
  if (policy.spec.distance) {
    decider->distance_ = values.host("new_state." + *policy.spec.distance);
  }
  const bool is_usable =
      decider->compute_.dtype == DType::kBool && decider->compute_.data != nullptr &&
      decider->mix_.dtype == DType::kFloat32 && decider->mix_.data != nullptr &&
      decider->mix_size() == policy.spec.history.maximum &&
      (decider->computed_steps_.data == nullptr ||
       decider->computed_steps_.dtype == DType::kInt64) &&
      (decider->distance_.data == nullptr || decider->distance_.dtype == DType::kFloat32);
  if (!is_usable) {
    return Status(Code::kBundle, "graph '" + policy.graph + "'",
                  "lacks 'compute' or 'mix', or declares them in another dtype or size",
                  "build the bundle again");
  }
  decider->reset(1);
  return decider;
}

void Decider::reset(std::int64_t step_count) {
  for (const auto& [name, state] : spec_->state) values_.set("state." + name, state.initial);
  values_.set("guard_state.consecutive", 0.0);
  values_.set("guard_state.reused", 0.0);
  values_.set("step_count", static_cast<double>(step_count));
}

Result<Verdict> Decider::decide(std::int64_t step_index, const std::int64_t* computed_steps,
                                std::int64_t held, std::size_t arrangement) noexcept {
  if (step_index_.data != nullptr) store_number(step_index_, 0, static_cast<double>(step_index));
  if (exact_.data != nullptr) {
    const bool is_exact = std::binary_search(exact_steps_.begin(), exact_steps_.end(), step_index);
    store_number(exact_, 0, is_exact ? 1.0 : 0.0);
  }
  if (computed_steps_.data != nullptr) {
    for (std::int64_t age = 0; age < computed_steps_.shape.elements(); ++age) {
      computed_steps_.as<std::int64_t>()[age] = age < held ? computed_steps[age] : -1;
    }
  }
  FREEWHEEL_TRY(values_.upload());
  FREEWHEEL_TRY(calls_[arrangement]->run());
  FREEWHEEL_TRY(values_.download());
  Verdict verdict;
  verdict.compute = *compute_.as<std::uint8_t>() != 0;
  verdict.mix = mix_.as<float>();
  verdict.distance = distance_.data != nullptr ? static_cast<double>(*distance_.as<float>())
                                               : std::numeric_limits<double>::quiet_NaN();
  for (const Carried& carried : carried_) {
    std::memcpy(carried.state.data, carried.next.data, carried.state.bytes());
  }
  return verdict;
}

}  // namespace freewheel

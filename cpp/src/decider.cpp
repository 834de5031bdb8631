// SPDX-License-Identifier: Apache-2.0
#include "decider.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <string_view>
#include <utility>

#include "try.h"

namespace freewheel {
namespace {

std::map<std::string, Io> without(std::map<std::string, Io> ios, const Tensors& names) {
  for (const auto& [name, tensor] : names) ios.erase(name);
  return ios;
}

/// Whether every session gives an input of this name to a policy's graph.
bool is_given(const std::string& name) {
  constexpr const char* kNames[] = {"step_index",         "step_count",      "exact",
                                    "timestep",           "sigma",           "computed_steps",
                                    "computed_timesteps", "computed_sigmas", "seconds_left",
                                    "computed_seconds",   "reused_seconds"};
  constexpr std::string_view kPrefixes[] = {"state.", "param.", "guard.", "guard_state."};
  const auto begins = [&](std::string_view p) { return name.compare(0, p.size(), p) == 0; };
  return std::any_of(std::begin(kPrefixes), std::end(kPrefixes), begins) ||
         std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

}  // namespace

Result<std::unique_ptr<Decider>> Decider::create(
    Model& model, const PolicyEntry& policy,
    const std::map<std::string, std::vector<double>>& parameters, const Guard& guard,
    const std::vector<Tensors>& arrangements) {
  auto decider = std::make_unique<Decider>();
  const GraphEntry& graph = model.manifest().graphs.at(policy.graph);
  for (const auto& [name, io] : graph.inputs) {
    if (is_given(name) || arrangements[0].count(name) != 0) continue;
    return Status(Code::kBundle, "graph '" + policy.graph + "', input '" + name + "'",
                  "is nothing that a session gives", "update Freewheel, or build the bundle again");
  }
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
  decider->timestep_ = values.host("timestep");
  decider->sigma_ = values.host("sigma");
  decider->computed_steps_ = values.host("computed_steps");
  decider->computed_timesteps_ = values.host("computed_timesteps");
  decider->computed_sigmas_ = values.host("computed_sigmas");
  decider->seconds_left_ = values.host("seconds_left");
  decider->computed_seconds_ = values.host("computed_seconds");
  decider->reused_seconds_ = values.host("reused_seconds");
  decider->compute_ = values.host("compute");
  decider->mix_ = values.host("mix");
  if (policy.spec.distance) {
    decider->distance_ = values.host("new_state." + *policy.spec.distance);
  }
  const auto is_history = [&](const Tensor& tensor, DType dtype) {
    return tensor.data == nullptr ||
           (tensor.dtype == dtype && tensor.shape.elements() == policy.spec.history.maximum);
  };
  const bool is_usable =
      decider->compute_.dtype == DType::kBool && decider->compute_.data != nullptr &&
      decider->mix_.dtype == DType::kFloat32 && decider->mix_.data != nullptr &&
      decider->mix_size() == policy.spec.history.maximum &&
      is_history(decider->computed_steps_, DType::kInt64) &&
      is_history(decider->computed_timesteps_, DType::kFloat32) &&
      is_history(decider->computed_sigmas_, DType::kFloat32) &&
      (decider->distance_.data == nullptr || decider->distance_.dtype == DType::kFloat32);
  if (!is_usable) {
    return Status(Code::kBundle, "graph '" + policy.graph + "'",
                  "lacks 'compute' or 'mix', or declares them in another dtype or size",
                  "build the bundle again");
  }
  return decider;
}

void Decider::reset(const Schedule& schedule) {
  schedule_ = &schedule;
  for (const auto& [name, state] : spec_->state) values_.set("state." + name, state.initial);
  values_.set("guard_state.consecutive", 0.0);
  values_.set("guard_state.reused", 0.0);
  values_.set("step_count", static_cast<double>(schedule.steps()));
}

Result<DecisionRecord> Decider::decide(std::int64_t step_index, const std::int64_t* computed_steps,
                                       std::int64_t held, std::size_t arrangement,
                                       const Pace& pace) noexcept {
  if (step_index_.data != nullptr) store_number(step_index_, 0, static_cast<double>(step_index));
  if (exact_.data != nullptr) {
    const bool is_exact = std::binary_search(exact_steps_.begin(), exact_steps_.end(), step_index);
    store_number(exact_, 0, is_exact ? 1.0 : 0.0);
  }
  const std::vector<double>&timesteps = schedule_->timesteps, &sigmas = schedule_->sigmas;
  const auto now = static_cast<std::size_t>(step_index);
  if (timestep_.data != nullptr) store_number(timestep_, 0, timesteps[now]);
  if (sigma_.data != nullptr) store_number(sigma_, 0, sigmas[now]);
  const std::pair<const Tensor&, double> seconds[] = {{seconds_left_, pace.seconds_left},
                                                      {computed_seconds_, pace.computed_seconds},
                                                      {reused_seconds_, pace.reused_seconds}};
  for (const auto& [tensor, value] : seconds) {
    if (tensor.data != nullptr) store_number(tensor, 0, value);
  }
  for (std::int64_t age = 0; age < spec_->history.maximum; ++age) {
    const bool is_held = age < held;
    const std::size_t past = is_held ? static_cast<std::size_t>(computed_steps[age]) : 0;
    const double step = is_held ? static_cast<double>(past) : -1.0;
    if (computed_steps_.data != nullptr) store_number(computed_steps_, age, step);
    if (computed_timesteps_.data != nullptr) {
      store_number(computed_timesteps_, age, is_held ? timesteps[past] : 0.0);
    }
    if (computed_sigmas_.data != nullptr) {
      store_number(computed_sigmas_, age, is_held ? sigmas[past] : 0.0);
    }
  }
  FREEWHEEL_TRY(values_.upload());
  FREEWHEEL_TRY(calls_[arrangement]->run());
  FREEWHEEL_TRY(values_.download());
  DecisionRecord decision;
  decision.compute = *compute_.as<std::uint8_t>() != 0;
  decision.mix = mix_.as<float>();
  decision.distance = distance_.data != nullptr ? static_cast<double>(*distance_.as<float>())
                                                : std::numeric_limits<double>::quiet_NaN();
  for (const Carried& carried : carried_) {
    std::memcpy(carried.state.data, carried.next.data, carried.state.bytes());
  }
  return decision;
}

}  // namespace freewheel

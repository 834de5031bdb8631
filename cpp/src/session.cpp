// SPDX-License-Identifier: Apache-2.0
#include "freewheel/session.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "branch_cache.h"
#include "cancellation.h"
#include "denoising.h"
#include "expert.h"
#include "promise.h"
#include "streams.h"
#include "stretch.h"
#include "timed.h"
#include "try.h"

namespace freewheel {
namespace {

/// Which expert denoises at a timestep; the last one serves what lies below every boundary.
std::size_t expert_at(const std::vector<ExpertEntry>& experts, double timestep) noexcept {
  const auto found = std::find_if(experts.begin(), experts.end(), [&](const ExpertEntry& expert) {
    return static_cast<float>(timestep) >= static_cast<float>(expert.from_timestep);
  });
  if (found != experts.end()) return static_cast<std::size_t>(found - experts.begin());
  return experts.empty() ? 0 : experts.size() - 1;
}

/// One of the things that a run samples.
struct Sampled {
  std::string name;  // of its latents
  Denoising run;
};

}  // namespace

/// Everything behind the public face: hands steps to the expert that denoises there.
class Session::Impl {
 public:
  explicit Impl(std::shared_ptr<Model> model) : base_(std::move(model)), model_(base_) {}

  Status initialise();
  Status use_loras(const std::vector<LoraUse>& loras);
  Status run(const RunRequest& request);
  Status begin(Schedule schedule, const CacheSetting& setting);
  Status set_prompt(const std::string& branch, const Tensors& states);
  Status prepare(const NamedTensor* inputs, std::size_t count);
  Result<Tensor> step(std::string_view branch, std::int64_t step_index, const NamedTensor* inputs,
                      std::size_t count);
  const Tensors& outputs(std::string_view branch) const noexcept;

  std::shared_ptr<Model> base_;   // the bundle's own weights
  std::shared_ptr<Model> model_;  // the same, or with LoRAs merged into some
  RunStatistics statistics_;
  Cancellation cancellation_;

 private:
  const Manifest& manifest() const { return model_->manifest(); }
  Status start(const Schedule& schedule, const CacheSetting& setting);
  Status share_out(const Schedule& schedule, const CacheSetting& setting);
  std::size_t expert_of(std::int64_t step_index) const noexcept;
  std::int64_t last_step(std::string_view branch) const noexcept;
  Result<std::vector<SamplerTable>> tables_of(const RunRequest& request) const;
  Status denoise(const RunRequest& request, const std::vector<SamplerTable>& tables);
  Status denoise_branch(const RunRequest& request, std::size_t side,
                        const std::vector<NamedTensor>& inputs, std::vector<Sampled>& sampled);

  std::vector<LoraUse> loras_;                    // of model_
  std::vector<std::unique_ptr<Expert>> experts_;  // none after weights could not be changed
  std::vector<std::int64_t> firsts_;  // of each expert: the run's step that is its first
  std::int64_t steps_ = 0;            // 0: no run
  std::int64_t last_step_ = -1;       // of any branch
  Clock::time_point began_;
};

Status Session::Impl::initialise() {
  const std::size_t count = std::max<std::size_t>(manifest().experts.size(), 1);
  std::vector<std::unique_ptr<Expert>> experts;
  for (std::size_t index = 0; index < count; ++index) {
    FREEWHEEL_ASSIGN(std::unique_ptr<Expert> expert,
                     Expert::create(*model_, index, statistics_, cancellation_));
    experts.push_back(std::move(expert));
  }
  experts_ = std::move(experts);
  firsts_.assign(count, 0);
  return {};
}

Status Session::Impl::use_loras(const std::vector<LoraUse>& loras) {
  if (loras == loras_ && !experts_.empty()) return {};
  FREEWHEEL_ASSIGN(const std::vector<Lora> opened, open_loras(base_->bundle(), loras));
  // What was merged before is gone before the next is merged: two never take memory at once.
  steps_ = 0;
  experts_.clear();
  model_ = base_;
  loras_.clear();
  auto merged = merge_loras(base_->bundle(), opened, base_->threads());
  if (merged.ok() && !loras.empty()) {
    model_ = Model::with_weights(base_, std::move(merged).value());
    loras_ = loras;
  }
  Status status = initialise();
  return merged.ok() ? std::move(status) : std::move(merged).status();
}

Status Session::Impl::begin(Schedule schedule, const CacheSetting& setting) {
  steps_ = 0;  // no step may run on what is half set up
  last_step_ = -1;
  began_ = Clock::now();
  if (experts_.empty()) FREEWHEEL_TRY(initialise());
  if (schedule.sigmas.empty()) {
    std::transform(schedule.timesteps.begin(), schedule.timesteps.end(),
                   std::back_inserter(schedule.sigmas), Schedule::flow_sigma);
  }
  FREEWHEEL_TRY(start(schedule, setting));
  steps_ = statistics_.steps;
  return {};
}

Status Session::Impl::start(const Schedule& schedule, const CacheSetting& setting) {
  const std::vector<double>& timesteps = schedule.timesteps;
  const auto are_finite = [](const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
  };
  std::map<std::string, const std::vector<double>*> others = {{"sigmas", &schedule.sigmas}};
  const std::vector<std::string> sampled = manifest().latents();
  for (const auto& [latents, values] : schedule.beside) {
    if (latents == kLatents ||
        std::find(sampled.begin(), sampled.end(), latents) == sampled.end()) {
      return Status(Code::kRequest, "timesteps of '" + latents + "'",
                    "are given, and the model samples no such latents beside the first",
                    "leave them out");
    }
    others["timesteps of '" + latents + "'"] = &values;
  }
  for (const auto& [name, values] : others) {
    if (values->size() == timesteps.size() && are_finite(*values)) continue;
    return Status(Code::kRequest, name,
                  "are [" + std::to_string(values->size()) + "], expected [" +
                      std::to_string(timesteps.size()) + "] finite values",
                  "take them from a sampler's table, or leave them out");
  }
  if (timesteps.empty() || !are_finite(timesteps)) {
    return Status(Code::kRequest, "timesteps",
                  "are [" + std::to_string(timesteps.size()) + "], expected [steps] finite values",
                  "take them from a sampler's table");
  }
  FREEWHEEL_ASSIGN(const ResolvedSetting resolved,
                   ResolvedSetting::for_all_branches(manifest(), setting));
  FREEWHEEL_TRY(check_bound_steps(setting, Stretch::of(setting, schedule)));
  statistics_ = RunStatistics();
  statistics_.policy = resolved.policy->spec.name;
  statistics_.is_folded = resolved.is_folded();
  statistics_.steps = static_cast<std::int64_t>(timesteps.size());
  statistics_.depth = resolved.depth();
  statistics_.always_run = resolved.always_run();
  statistics_.deadline = setting.deadline;
  statistics_.branches.reserve(8);
  return share_out(schedule, resolved.setting);
}

/// Begins a run of every expert over the timesteps that are its own.
Status Session::Impl::share_out(const Schedule& schedule, const CacheSetting& setting) {
  std::vector<Schedule> shares(experts_.size());
  std::size_t current = 0;
  for (std::size_t step = 0; step < schedule.timesteps.size(); ++step) {
    const double timestep = schedule.timesteps[step];
    const std::size_t wanted = expert_at(manifest().experts, timestep);
    if (wanted < current) {
      return Status(Code::kRequest, "timesteps",
                    "rise over " + std::to_string(manifest().experts[wanted].from_timestep) +
                        ", where another expert denoises",
                    "give falling timesteps");
    }
    current = wanted;
    shares[wanted].timesteps.push_back(timestep);
    shares[wanted].sigmas.push_back(schedule.sigmas[step]);
    for (const auto& [latents, values] : schedule.beside) {
      shares[wanted].beside[latents].push_back(values[step]);
    }
  }
  std::int64_t first = 0;
  std::vector<std::string>& warnings = statistics_.warnings;
  for (std::size_t index = 0; index < experts_.size(); ++index) {
    const auto stretch =
        shares[index].steps() > 0 ? Stretch::of(setting, shares[index]) : std::nullopt;
    if (stretch) {
      for (std::string& text : stretch->warnings()) warnings.push_back(std::move(text));
    }
    FREEWHEEL_TRY(experts_[index]->begin(std::move(shares[index]), first, setting));
    firsts_[index] = first;
    first += experts_[index]->steps();
  }
  return {};
}

std::size_t Session::Impl::expert_of(std::int64_t step_index) const noexcept {
  std::size_t found = 0;
  for (std::size_t index = 1; index < experts_.size(); ++index) {
    if (step_index >= firsts_[index] && experts_[index]->steps() > 0) found = index;
  }
  return found;
}

std::int64_t Session::Impl::last_step(std::string_view branch) const noexcept {
  for (std::size_t index = experts_.size(); index-- > 0;) {
    const std::int64_t last = experts_[index]->last_step(branch);
    if (last >= 0) return firsts_[index] + last;
  }
  return -1;
}

Status Session::Impl::set_prompt(const std::string& branch, const Tensors& states) {
  for (const auto& expert : experts_) FREEWHEEL_TRY(expert->set_prompt(branch, states));
  return {};
}

Status Session::Impl::prepare(const NamedTensor* inputs, std::size_t count) {
  if (steps_ == 0) return Status(Code::kRequest, "session", "has no run", "call begin() first");
  for (const auto& expert : experts_) {
    if (expert->steps() > 0) FREEWHEEL_TRY(expert->prepare(inputs, count));
  }
  return {};
}

Result<Tensor> Session::Impl::step(std::string_view branch, std::int64_t step_index,
                                   const NamedTensor* inputs, std::size_t count) {
  if (steps_ == 0) return Status(Code::kRequest, "session", "has no run", "call begin() first");
  const std::int64_t done = last_step(branch);
  const bool is_next = step_index == last_step_ || step_index == last_step_ + 1;
  if (step_index <= done || !is_next || step_index >= steps_) {
    return Status(Code::kRequest,
                  "branch '" + std::string(branch) + "', step " + std::to_string(step_index),
                  "does not follow step " + std::to_string(std::max(done, last_step_)) + " of " +
                      std::to_string(steps_),
                  "call begin() at the start of a run, and steps in order");
  }
  const std::size_t index = expert_of(step_index);
  auto output = experts_[index]->step(branch, step_index - firsts_[index], inputs, count);
  if (output.ok()) {
    last_step_ = step_index;
    statistics_.loop_seconds = seconds_since(began_);
  }
  if (output.ok() || output.status().code() == Code::kRequest) return output;
  steps_ = 0;  // the run is over
  if (output.status().code() != Code::kNotFinite) return output;
  const Status& fault = output.status();
  return Status(Code::kNotFinite,
                "branch '" + std::string(branch) + "', step " + std::to_string(step_index) + ", " +
                    fault.where(),
                fault.what(), fault.hint());
}

Status Session::Impl::run(const RunRequest& request) {
  FREEWHEEL_TRY(check_run(model_->bundle(), request));
  FREEWHEEL_ASSIGN(const std::vector<SamplerTable> tables, tables_of(request));
  FREEWHEEL_TRY(use_loras(request.loras));
  Schedule schedule{tables.front().timesteps, tables.front().sigmas, {}};
  const std::vector<std::string> sampled = manifest().latents();
  for (std::size_t at = 1; at < sampled.size(); ++at) {
    schedule.beside[sampled[at]] = tables[at].timesteps;
  }
  FREEWHEEL_TRY(begin(std::move(schedule), request.cache));
  statistics_.warnings.insert(statistics_.warnings.begin(), request.warnings.begin(),
                              request.warnings.end());
  for (std::size_t side = 0; side < (request.is_guided() ? 2 : 1); ++side) {
    FREEWHEEL_TRY(set_prompt(kSides[side], request.prompts.at(kSides[side])));
  }
  return denoise(request, tables);
}

/// The sampler's table of each of the things that the model samples.
Result<std::vector<SamplerTable>> Session::Impl::tables_of(const RunRequest& request) const {
  const double* shift = request.flow_shift ? &*request.flow_shift : nullptr;
  std::vector<SamplerTable> tables;
  for (const std::string& latents : manifest().latents()) {
    FREEWHEEL_ASSIGN(SamplerTable table,
                     model_->bundle().sampler(request.sampler, shift, request.steps, latents));
    tables.push_back(std::move(table));
  }
  return tables;
}

Status Session::Impl::denoise(const RunRequest& request, const std::vector<SamplerTable>& tables) {
  std::vector<Sampled> sampled;
  for (const std::string& name : manifest().latents()) {
    const bool is_first = sampled.empty();
    FREEWHEEL_ASSIGN(Denoising run,
                     Denoising::create(is_first ? request.latents : request.beside.at(name).latents,
                                       is_first ? request.condition : Tensor{},
                                       tables[sampled.size()], model_->memory()));
    sampled.push_back({name, std::move(run)});
  }
  std::vector<NamedTensor> inputs;
  for (const Sampled& one : sampled) inputs.push_back({one.name, {}});
  Denoising& first = sampled.front().run;
  while (first.step_index() < tables.front().steps()) {
    for (std::size_t at = 0; at < sampled.size(); ++at) inputs[at].tensor = sampled[at].run.input();
    for (std::size_t side = 0; side < (request.is_guided() ? 2 : 1); ++side) {
      FREEWHEEL_TRY(denoise_branch(request, side, inputs, sampled));
    }
    const Timed timed(statistics_, Segment::kSampler);
    const std::int64_t index = first.step_index();
    const std::size_t expert = expert_of(index);
    for (Sampled& one : sampled) {
      const Tensor& output = one.run.guided(request.scale_of(one.name, expert));
      if (&one != &sampled.front() || !request.on_step) continue;
      // The listener sees the sample before the next may overwrite it (a window of 1 does).
      const auto at = static_cast<std::size_t>(index);
      request.on_step({index, statistics_.steps, tables[0].timesteps[at], tables[0].sigmas[at],
                       first.sample(), output});
    }
    for (Sampled& one : sampled) one.run.advance();
  }
  for (const Sampled& one : sampled) FREEWHEEL_TRY(one.run.check(one.name));
  for (const Sampled& one : sampled) one.run.write();
  return {};
}

/// Runs the model of one branch at the current step, and tells the listener.
Status Session::Impl::denoise_branch(const RunRequest& request, std::size_t side,
                                     const std::vector<NamedTensor>& inputs,
                                     std::vector<Sampled>& sampled) {
  const char* name = kSides[side];
  const std::int64_t index = sampled.front().run.step_index();
  if (auto done = step(name, index, inputs.data(), inputs.size()); !done.ok()) {
    return std::move(done).status();
  }
  const Tensors& outputs = this->outputs(name);
  for (Sampled& one : sampled) {
    const Tensor& output = outputs.at(one.name);
    FREEWHEEL_ASSIGN(const Tensor taken, one.run.take(side, output));
    const bool is_copy = taken.data != output.data;  // of device memory: `step` can't look into it
    if (is_copy && model_->checks_finite() && !is_finite(taken)) {
      return not_finite("branch '" + std::string(name) + "', step " + std::to_string(index));
    }
  }
  if (!request.on_branch_step) return {};
  const BranchStatistics& done = statistics_.branches[side];
  const auto at = static_cast<std::size_t>(index);
  request.on_branch_step({name, index, statistics_.steps, done.decisions[at] == Decision::kComputed,
                          done.distance[at], done.seconds[at]});
  return {};
}

const Tensors& Session::Impl::outputs(std::string_view branch) const noexcept {
  static const Tensors kNone;
  const std::int64_t last = last_step(branch);
  if (last < 0) return kNone;
  const Tensors* found = experts_[expert_of(last)]->outputs(branch);
  return found == nullptr ? kNone : *found;
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

Result<std::unique_ptr<Session>> Session::create(std::shared_ptr<Model> model) {
  auto impl = std::make_unique<Impl>(std::move(model));
  FREEWHEEL_TRY(impl->initialise());
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

Model& Session::model() noexcept { return *impl_->base_; }
const RunStatistics& Session::statistics() const noexcept { return impl_->statistics_; }

Status Session::run(const RunRequest& request) {
  Cancellation& cancellation = impl_->cancellation_;
  int idle = Cancellation::kIdle;
  if (!cancellation.state.compare_exchange_strong(idle, Cancellation::kRunning)) {
    return Status(Code::kRequest, "session", "is running already", "use one session per thread");
  }
  cancellation.requested = request.cancelled;
  Status status = impl_->run(request);
  cancellation.requested = nullptr;
  cancellation.state.store(Cancellation::kIdle);
  return status;
}

void Session::cancel() noexcept {
  int running = Cancellation::kRunning;
  impl_->cancellation_.state.compare_exchange_strong(running, Cancellation::kStopping);
}

Status Session::use_loras(const std::vector<LoraUse>& loras) { return impl_->use_loras(loras); }
Status Session::begin(const std::vector<double>& timesteps, const CacheSetting& setting,
                      const std::vector<double>& sigmas,
                      const std::map<std::string, std::vector<double>>& beside) {
  return impl_->begin({timesteps, sigmas, beside}, setting);
}
Status Session::set_prompt(const std::string& branch, const Tensors& states) {
  return impl_->set_prompt(branch, states);
}
Status Session::prepare(const NamedTensor* inputs, std::size_t count) {
  return impl_->prepare(inputs, count);
}
const Tensors& Session::outputs(std::string_view branch) const noexcept {
  return impl_->outputs(branch);
}
Result<Tensor> Session::step(std::string_view branch, std::int64_t step_index,
                             const NamedTensor* inputs, std::size_t count) {
  return impl_->step(branch, step_index, inputs, count);
}

}  // namespace freewheel

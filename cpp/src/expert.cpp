// SPDX-License-Identifier: Apache-2.0
#include "expert.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "freewheel/dims.h"
#include "streams.h"
#include "timed.h"
#include "try.h"

namespace freewheel {
namespace {

/// Rows of the tables that a graph makes: one for each element of what it is given.
Result<std::int64_t> rows_of(const std::string& name, const GraphEntry& graph,
                             const TimestepInputs& given) {
  const auto first = graph.inputs.empty() ? given.end() : given.find(graph.inputs.begin()->first);
  if (first != given.end()) return static_cast<std::int64_t>(first->second.size());
  return Status(Code::kBundle, "graph '" + name + "'", "runs once per run, and takes no timestep",
                "build the bundle again");
}

}  // namespace

Status not_finite(const std::string& where) {
  return Status(Code::kNotFinite, where, "made values that are not finite",
                "run 'freewheel verify'; the body may have to be built as float32");
}

Result<std::unique_ptr<Expert>> Expert::create(Model& model, std::size_t index,
                                               RunStatistics& statistics,
                                               const Cancellation& cancellation) {
  std::unique_ptr<Expert> expert(new Expert(model, index, statistics, cancellation));
  FREEWHEEL_TRY(expert->initialise());
  return expert;
}

Status Expert::initialise() {
  for (const auto& [name, entry] : manifest().inputs) {
    if (entry.runs == "step") step_inputs_.push_back({name, &entry, {}});
  }
  FREEWHEEL_ASSIGN(block_tables_, BlockTables::create(model_, index_, {}, /*by_prompt=*/false));
  // The rows of per-run tables, shaped as the graphs that read them declare.
  for (const auto& [graph_name, graph] : manifest().graphs) {
    if (graph.runs != "run") continue;
    for (const auto& [name, io] : graph.outputs) {
      if (const Io* row = manifest().row_of(name)) {
        FREEWHEEL_TRY(row_buffers_.allocate(model_.memory(), name, *row, {}, rows_views_));
        rows_.push_back({name, rows_views_.at(name), {}});
        continue;
      }
      // Policies alone look at it, in its table: this says what shape it has.
      FREEWHEEL_TRY(row_buffers_.allocate(model_.memory(), name, io, {{"steps", 1}}, rows_views_));
    }
  }
  return {};
}

Status Expert::begin(Schedule schedule, std::int64_t first, const CacheSetting& setting) {
  first_ = first;
  pacer_.begin(setting.deadline, seconds_now());
  CacheSetting own = setting;
  if (own.deadline) own.deadline = 1.0;  // how long it is changes nothing that is bound
  const bool is_same = own == setting_;
  setting_ = std::move(own);
  schedule_ = std::move(schedule);
  row_ = -1;
  shared_step_ = -1;
  is_one_decision_ = manifest().policies.at(setting.policy).spec.is_one_decision;
  for (const auto& branch : branches_) {
    branch->last_step = -1;
    if (!is_same) branch->cache.reset();
  }
  if (schedule_.timesteps.empty()) return {};
  FREEWHEEL_TRY(compute_tables());
  for (const auto& branch : branches_) {
    if (branch->cache != nullptr) FREEWHEEL_TRY(branch->cache->reset(tables_, schedule_));
  }
  return {};
}

/// The branch's record, made when it takes its first step of a run: others don't show.
BranchStatistics& Expert::statistics_of(const Branch& branch) {
  auto& known = statistics_.branches;
  const auto found = std::find_if(known.begin(), known.end(), [&](const BranchStatistics& other) {
    return other.name == branch.name;
  });
  if (found != known.end()) return *found;
  const auto steps = static_cast<std::size_t>(statistics_.steps);
  BranchStatistics& fresh = known.emplace_back();
  fresh.name = branch.name;
  fresh.depth = branch.cache->depth();
  fresh.decisions.assign(steps, Decision::kSkipped);
  fresh.distance.assign(steps, std::numeric_limits<double>::quiet_NaN());
  fresh.seconds.assign(steps, 0.0);
  fresh.mix.assign(steps * static_cast<std::size_t>(fresh.depth), 0.0f);
  return fresh;
}

const Tensors* Expert::outputs(std::string_view name) const noexcept {
  for (const auto& branch : branches_) {
    if (branch->name == name && branch->last_step >= 0) return &branch->outputs;
  }
  return nullptr;
}

std::int64_t Expert::last_step(std::string_view name) const noexcept {
  for (const auto& branch : branches_) {
    if (branch->name == name) return branch->last_step;
  }
  return -1;
}

Status Expert::compute_tables() {
  TimestepInputs timesteps = timestep_inputs(manifest(), schedule_);
  if (timesteps == timesteps_ && !tables_.empty()) return {};
  const Timed timed(statistics_, Segment::kPrepare);
  Memory& memory = model_.memory();
  tables_.clear();
  BufferSet buffers;
  Tensors values;
  for (const auto& [name, host] : timesteps) {
    Io io;
    io.shape = {static_cast<std::int64_t>(host.size())};
    FREEWHEEL_TRY(buffers.allocate(memory, name, io, {}, values));
    FREEWHEEL_TRY(memory.upload(values.at(name).data, host.data(), host.size() * sizeof(float)));
  }
  for (const auto& [name, graph] : manifest().graphs) {
    if (graph.runs != "run") continue;
    FREEWHEEL_ASSIGN(const std::int64_t rows, rows_of(name, graph, timesteps));
    FREEWHEEL_TRY(buffers.allocate(memory, graph.outputs, {{"steps", rows}}, values));
    FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call, bind(name, values));
    FREEWHEEL_TRY(call->run());
    FREEWHEEL_TRY(memory.synchronize());
  }
  for (Row& row : rows_) {
    row.table = values.at(row.name);
    if (row.table.bytes() != row.row.bytes() * static_cast<std::size_t>(steps())) {
      return Status(Code::kBundle, "table '" + row.name + "'",
                    "has rows of another size than the graphs that read them",
                    "build the bundle again");
    }
  }
  FREEWHEEL_TRY(block_tables_->compute(values, steps(), {}));
  for (const auto& branch : branches_) {
    if (branch->body != nullptr) branch->body->forget_tables();
  }
  table_buffers_ = std::move(buffers);
  tables_ = std::move(values);
  timesteps_ = std::move(timesteps);
  return {};
}

Status Expert::set_prompt(const std::string& branch_name, const Tensors& states) {
  std::vector<Buffer> buffers;
  Tensors given;
  FREEWHEEL_TRY(check_prompt(manifest(), branch_name, states));
  for (const auto& [name, entry] : manifest().inputs) {
    if (entry.runs != "prompt") continue;
    const Tensor& state = states.at(name);
    if (state.data == nullptr) {
      return Status(Code::kRequest, "branch '" + branch_name + "', input '" + name + "'",
                    "is not encoded yet", "encode the prompt first");
    }
    FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(host_memory(), entry.dtype, state.shape));
    FREEWHEEL_TRY(convert(state, buffer.view()));
    given[name] = buffer.view();
    buffers.push_back(std::move(buffer));
  }
  const auto found =
      std::find_if(branches_.begin(), branches_.end(),
                   [&](const std::unique_ptr<Branch>& b) { return b->name == branch_name; });
  if (found == branches_.end()) {
    auto branch = std::make_unique<Branch>();
    branch->name = branch_name;
    branch->prompt = std::move(given);
    branch->prompt_buffers = std::move(buffers);
    branches_.push_back(std::move(branch));
    return {};
  }
  Branch& branch = **found;
  bool is_same = true, fits = true;
  for (const auto& [name, tensor] : given) {
    const Tensor& known = branch.prompt.at(name);
    fits = fits && known.shape == tensor.shape;
    is_same = is_same && fits && std::memcmp(known.data, tensor.data, tensor.bytes()) == 0;
  }
  if (is_same) return {};
  branch.prompt = std::move(given);
  branch.prompt_buffers = std::move(buffers);
  if (branch.body == nullptr) return {};
  if (!fits) {
    branch.unbind();
    return {};
  }
  const Timed timed(statistics_, Segment::kPrompt);
  Status status = branch.body->set_prompt(branch.prompt);
  if (!status.ok()) branch.unbind();
  return status;
}

Status Expert::place(const NamedTensor* inputs, std::size_t count) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    bool fits = !shared_.empty();
    for (const StepInput& wanted : step_inputs_) {
      const NamedTensor* given = std::find_if(
          inputs, inputs + count, [&](const NamedTensor& i) { return i.name == wanted.name; });
      if (given == inputs + count || given->tensor.data == nullptr) {
        return Status(Code::kRequest, "input '" + wanted.name + "'", "is missing",
                      "give every per-step input");
      }
      if (given->tensor.dtype != wanted.entry->dtype) {
        return Status(Code::kRequest, "input '" + wanted.name + "'",
                      std::string("is ") + dtype_name(given->tensor.dtype) + ", the bundle takes " +
                          dtype_name(wanted.entry->dtype),
                      "convert it");
      }
      if (!fits || given->tensor.shape != wanted.buffer.shape) {
        fits = false;
        continue;
      }
      FREEWHEEL_TRY(
          model_.memory().upload(wanted.buffer.data, given->tensor.data, given->tensor.bytes()));
    }
    if (fits) return {};
    FREEWHEEL_TRY(allocate(inputs, count));
  }
  return Status(Code::kInternal, "inputs", "don't fit the buffers made for them");
}

Status Expert::allocate(const NamedTensor* inputs, std::size_t count) {
  const Timed timed(statistics_, Segment::kPrepare);
  pacer_.forget();
  Dims sizes;
  for (const StepInput& wanted : step_inputs_) {
    const NamedTensor* given = std::find_if(
        inputs, inputs + count, [&](const NamedTensor& i) { return i.name == wanted.name; });
    FREEWHEEL_ASSIGN(const Dims found, match_dims(wanted.name, *wanted.entry, given->tensor.shape));
    for (const auto& [dim, size] : found) {
      const auto known = sizes.emplace(dim, size).first;
      if (known->second == size) continue;
      return Status(Code::kRequest, "input '" + wanted.name + "'",
                    "has " + dim + " " + std::to_string(size) + ", others have " +
                        std::to_string(known->second),
                    "give inputs of one batch and one size");
    }
  }
  FREEWHEEL_ASSIGN(Dims dims, derive_dims(manifest(), sizes));
  for (const auto& branch : branches_) branch->unbind();
  shared_.clear();
  shared_buffers_ = {};
  Memory& memory = model_.memory();
  BufferSet buffers;
  Tensors shared = rows_views_;
  for (const StepInput& input : step_inputs_) {
    FREEWHEEL_TRY(buffers.allocate(memory, input.name, *input.entry, dims, shared));
  }
  for (const std::string& stream : manifest().cached()) {
    const Io& begun = manifest().graphs.at("head").outputs.at(stream);
    for (const char* place : {"", "_even", "_odd"}) {
      FREEWHEEL_TRY(buffers.allocate(memory, stream + place, begun, dims, shared));
    }
  }
  for (const auto& [name, graph] : manifest().graphs) {
    if (graph.runs != "shape") continue;
    FREEWHEEL_TRY(buffers.allocate(memory, graph.outputs, dims, shared));
    FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call, bind(name, shared));
    FREEWHEEL_TRY(call->run());
    FREEWHEEL_TRY(memory.synchronize());
  }
  for (StepInput& input : step_inputs_) input.buffer = shared.at(input.name);
  begun_.clear();
  for (const std::string& stream : manifest().cached()) begun_[stream] = shared.at(stream);
  shared_buffers_ = std::move(buffers);
  shared_ = std::move(shared);
  dims_ = std::move(dims);
  return {};
}

Status Expert::bind_branch(Branch& branch) {
  if (branch.body == nullptr) {
    const Timed timed(statistics_, Segment::kPrepare);
    FREEWHEEL_ASSIGN(
        std::unique_ptr<Body> body,
        Body::create(model_, index_, branch.name, shared_, branch.prompt, dims_, *block_tables_));
    FREEWHEEL_TRY(body->set_prompt(branch.prompt));
    Tensors values = body->values();
    for (const std::string& stream : manifest().cached()) {
      values[stream + kOut] = body->result(stream);
    }
    BufferSet outputs;
    FREEWHEEL_TRY(outputs.allocate(model_.memory(), manifest().graphs.at("finish").outputs,
                                   body->dims(), values));
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> head, bind("head", values));
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> finish, bind("finish", values));
    branch.outputs.clear();
    for (const std::string& latents : manifest().latents()) {
      const std::string name = beside(latents, kLatents, kModelOutput);
      const Tensor& output = values.at(name);
      if (output.dtype != DType::kFloat32) {
        return Status(Code::kBundle, "graph 'finish'", "does not output a float32 '" + name + "'",
                      "build the bundle again");
      }
      branch.outputs[latents] = output;
    }
    branch.model_output = branch.outputs.at(kLatents);
    branch.output_buffers = std::move(outputs);
    branch.head = std::move(head);
    branch.finish = std::move(finish);
    branch.body = std::move(body);
    branch.cache.reset();
  }
  if (branch.cache == nullptr) {
    const Timed timed(statistics_, Segment::kPrepare);
    FREEWHEEL_ASSIGN(const ResolvedSetting resolved,
                     ResolvedSetting::create(manifest(), setting_.for_branch(branch.name)));
    FREEWHEEL_ASSIGN(std::unique_ptr<BranchCache> cache,
                     BranchCache::create(model_, resolved, *branch.body, branch.body->values(),
                                         branch.body->dims()));
    FREEWHEEL_TRY(cache->reset(tables_, schedule_));
    branch.cache = std::move(cache);
  }
  const Timed timed(statistics_, Segment::kPrepare);
  return branch.body->modulate(tables_, steps());
}

Result<Expert::Branch*> Expert::ready_branch(std::string_view name) {
  for (const auto& branch : branches_) {
    if (branch->name != name) continue;
    FREEWHEEL_TRY(bind_branch(*branch));
    return branch.get();
  }
  return Status(Code::kRequest, "branch '" + std::string(name) + "'", "has no prompt",
                "call set_prompt() first");
}

Status Expert::select_row(Branch& branch, std::int64_t step_index) {
  FREEWHEEL_TRY(branch.body->select_row(step_index));
  if (step_index == row_) return {};
  FREEWHEEL_TRY(block_tables_->select(step_index));
  for (const Row& row : rows_) {
    const std::size_t bytes = row.row.bytes();
    const auto* source =
        row.table.as<std::uint8_t>() + static_cast<std::size_t>(step_index) * bytes;
    FREEWHEEL_TRY(model_.memory().copy(row.row.data, source, bytes));
  }
  row_ = step_index;
  return {};
}

Status Expert::prepare(const NamedTensor* inputs, std::size_t count) {
  FREEWHEEL_TRY(place(inputs, count));
  for (const auto& branch : branches_) {
    if (auto ready = ready_branch(branch->name); !ready.ok()) return std::move(ready).status();
  }
  return {};
}

/// Asks a branch's policy, or takes what another branch decided about the step.
Result<DecisionRecord> Expert::decide(Branch& branch, std::int64_t step_index) noexcept {
  if (!is_one_decision_) return branch.cache->decide(step_index, pace_, cancellation_);
  if (shared_step_ != step_index) {
    FREEWHEEL_ASSIGN(shared_decision_, branch.cache->decide(step_index, pace_, cancellation_));
    shared_step_ = step_index;
  }
  return branch.cache->affordable(shared_decision_);
}

/// Says which segment of the step just run first made values that are not finite. The memory of
/// devices is not looked into: there the session looks at the output that it downloads.
Status Expert::check_finite(const Branch& branch, bool computed) const noexcept {
  if (!model_.checks_finite() || !model_.memory().is_host()) return {};
  const auto are_finite = [](const Tensors& tensors) {
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const auto& named) { return is_finite(named.second); });
  };
  const bool is_kept_well = !computed || branch.cache->is_computed_finite();
  if (is_kept_well && are_finite(branch.outputs)) return {};
  const char* segment = "finish";
  if (!are_finite(begun_)) {
    segment = "head";
  } else if (!is_kept_well || !branch.body->is_finite()) {
    segment = computed ? "body" : "reuse";
  }
  return not_finite(std::string("segment '") + segment + "'");
}

Result<Tensor> Expert::step(std::string_view name, std::int64_t step_index,
                            const NamedTensor* inputs, std::size_t count) {
  if (cancellation_.is_wanted()) return cancelled();
  FREEWHEEL_TRY(place(inputs, count));
  FREEWHEEL_ASSIGN(Branch * branch, ready_branch(name));
  const Clock::time_point began = Clock::now();
  if (step_index != row_) {
    const auto spent = [&](Segment s) { return statistics_.seconds[static_cast<std::size_t>(s)]; };
    pace_ = pacer_.begin_step(seconds_now(), spent(Segment::kPrepare) + spent(Segment::kPrompt));
  }
  if (step_index > branch->last_step + 1) FREEWHEEL_TRY(branch->cache->rejoin(step_index));
  DecisionRecord decision;
  {
    const Timed timed(statistics_, Segment::kHead);
    FREEWHEEL_TRY(select_row(*branch, step_index));
    FREEWHEEL_TRY(branch->head->run());
  }
  {
    const Timed timed(statistics_, Segment::kDecide);
    FREEWHEEL_ASSIGN(decision, decide(*branch, step_index));
  }
  pacer_.note(decision.compute);
  if (cancellation_.is_wanted()) return cancelled();
  {
    const Timed timed(statistics_, decision.compute ? Segment::kBody : Segment::kReuse);
    FREEWHEEL_TRY(decision.compute ? branch->cache->compute(step_index, cancellation_)
                                   : branch->cache->reuse(decision, cancellation_));
  }
  {
    const Timed timed(statistics_, Segment::kFinish);
    FREEWHEEL_TRY(branch->finish->run());
    FREEWHEEL_TRY(model_.memory().synchronize());
    FREEWHEEL_TRY(check_finite(*branch, decision.compute));
    if (decision.compute) {
      FREEWHEEL_TRY(branch->cache->keep());
      FREEWHEEL_TRY(branch->cache->keep_output(branch->model_output));
      FREEWHEEL_TRY(model_.memory().synchronize());
    }
  }
  branch->last_step = step_index;
  BranchStatistics& statistics = statistics_of(*branch);
  const auto at = static_cast<std::size_t>(first_ + step_index);
  statistics.decisions[at] = decision.compute ? Decision::kComputed : Decision::kReused;
  statistics.distance[at] = decision.distance;
  statistics.seconds[at] = seconds_since(began);
  const auto depth = static_cast<std::size_t>(statistics.depth);
  for (std::size_t age = 0; age < depth && !decision.compute; ++age) {
    statistics.mix[at * depth + age] = decision.mix[age];
  }
  return branch->model_output;
}

}  // namespace freewheel

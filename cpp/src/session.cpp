// SPDX-License-Identifier: Apache-2.0
#include "freewheel/session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "body.h"
#include "branch_cache.h"
#include "cancellation.h"
#include "freewheel/sampler.h"
#include "try.h"

namespace freewheel {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point began) noexcept {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

/// Adds the seconds of a scope to a segment's.
class Timed {
 public:
  Timed(RunStatistics& statistics, Segment segment) noexcept
      : total_(statistics.seconds[static_cast<std::size_t>(segment)]), began_(Clock::now()) {}
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;
  ~Timed() { total_ += seconds_since(began_); }

 private:
  double& total_;
  Clock::time_point began_;
};

bool is_finite(const Tensor& tensor) noexcept {
  if (tensor.dtype != DType::kFloat32) return true;
  const float* values = tensor.as<float>();
  return std::all_of(values, values + tensor.shape.elements(),
                     [](float value) { return std::isfinite(value); });
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

/// Everything behind the public face.
class Session::Impl {
 public:
  explicit Impl(std::shared_ptr<Model> model) : model_(std::move(model)) {}

  Status initialise();
  Status run(const RunRequest& request);
  Status begin(const std::vector<double>& timesteps, const CacheSetting& setting);
  Status set_prompt(const std::string& branch, const Tensors& states);
  Status place(const NamedTensor* inputs, std::size_t count);
  Status prepare(const NamedTensor* inputs, std::size_t count);
  Result<Tensor> step(std::string_view branch, std::int64_t step_index, const NamedTensor* inputs,
                      std::size_t count);

  std::shared_ptr<Model> model_;
  RunStatistics statistics_;
  Cancellation cancellation_;

 private:
  /// A branch's prompt, and what is bound for it once shapes are known.
  struct Branch {
    std::string name;
    std::vector<Buffer> prompt_buffers;
    Tensors prompt;  // host, of the declared dtypes
    BufferSet outputs;
    Tensor model_output;
    std::unique_ptr<Body> body;
    std::unique_ptr<BranchCache> cache;
    std::unique_ptr<BoundCall> finish;
    std::int64_t last_step = -1;
    BranchStatistics* statistics = nullptr;

    void unbind() {
      cache.reset();
      finish.reset();
      body.reset();
      outputs = {};
    }
  };

  /// The current row of one per-run table.
  struct Row {
    std::string name;
    Tensor row, table;
  };

  /// A per-step input and the buffer that engines read it from.
  struct StepInput {
    std::string name;
    const InputEntry* entry;
    Tensor buffer;
  };

  const Manifest& manifest() const { return model_->manifest(); }
  Status start(const std::vector<double>& timesteps, const CacheSetting& setting);
  Status compute_tables(const std::vector<double>& timesteps);
  Status select_row(std::int64_t step_index);
  Status allocate(const NamedTensor* inputs, std::size_t count);
  Result<Branch*> ready_branch(std::string_view name);
  Status bind_branch(Branch& branch);
  void start_statistics();
  void start_statistics(Branch& branch);
  Status check_request(const RunRequest& request) const;
  Status denoise(const RunRequest& request, const SamplerTable& table);

  ResolvedSetting resolved_;
  std::vector<double> timesteps_;
  BufferSet table_buffers_, row_buffers_, shared_buffers_;
  Tensors tables_, rows_views_, shared_;
  std::vector<Row> rows_;
  std::int64_t row_ = -1;
  std::vector<StepInput> step_inputs_;
  Dims dims_;
  std::unique_ptr<BoundCall> head_;
  std::vector<std::unique_ptr<Branch>> branches_;
};

Status Session::Impl::initialise() {
  FREEWHEEL_ASSIGN(resolved_, ResolvedSetting::create(manifest(), CacheSetting{}));
  for (const auto& [name, entry] : manifest().inputs) {
    if (entry.runs == "step") step_inputs_.push_back({name, &entry, {}});
  }
  // The rows of per-run tables, shaped as the graphs that read them declare.
  for (const auto& [graph_name, graph] : manifest().graphs) {
    if (graph.runs != "run") continue;
    for (const auto& [name, io] : graph.outputs) {
      for (const auto& [reader_name, reader] : manifest().graphs) {
        const auto input = reader.inputs.find(name);
        if (input == reader.inputs.end() || rows_views_.count(name) != 0) continue;
        FREEWHEEL_TRY(
            row_buffers_.allocate(model_->memory(), name, input->second, {}, rows_views_));
        rows_.push_back({name, rows_views_.at(name), {}});
      }
    }
  }
  return {};
}

Status Session::Impl::begin(const std::vector<double>& timesteps, const CacheSetting& setting) {
  Status status = start(timesteps, setting);
  if (!status.ok()) timesteps_.clear();  // no step may run on what is half set up
  return status;
}

Status Session::Impl::start(const std::vector<double>& timesteps, const CacheSetting& setting) {
  const bool is_finite_list = std::all_of(timesteps.begin(), timesteps.end(),
                                          [](double value) { return std::isfinite(value); });
  if (timesteps.empty() || !is_finite_list) {
    return Status(Code::kRequest, "timesteps",
                  "are [" + std::to_string(timesteps.size()) + "], expected [steps] finite values",
                  "take them from a sampler's table");
  }
  FREEWHEEL_ASSIGN(ResolvedSetting resolved, ResolvedSetting::create(manifest(), setting));
  const bool is_same = resolved.setting == resolved_.setting;
  resolved_ = std::move(resolved);
  row_ = -1;
  statistics_ = RunStatistics();
  for (const auto& branch : branches_) {
    branch->last_step = -1;
    if (!is_same) branch->cache.reset();
  }
  FREEWHEEL_TRY(compute_tables(timesteps));
  start_statistics();
  for (const auto& branch : branches_) {
    if (branch->cache == nullptr) continue;
    FREEWHEEL_TRY(branch->cache->reset(tables_, statistics_.steps));
  }
  return {};
}

void Session::Impl::start_statistics() {
  statistics_.policy = resolved_.policy->spec.name;
  statistics_.is_folded = resolved_.is_folded();
  statistics_.steps = static_cast<std::int64_t>(timesteps_.size());
  statistics_.depth = resolved_.depth();
  statistics_.branches.clear();
  statistics_.branches.reserve(std::max<std::size_t>(branches_.size(), 8));
  for (const auto& branch : branches_) branch->statistics = nullptr;
}

/// Makes room for a branch's steps; branches that take no step in a run don't show.
void Session::Impl::start_statistics(Branch& branch) {
  const auto steps = static_cast<std::size_t>(statistics_.steps);
  if (statistics_.branches.size() == statistics_.branches.capacity()) {
    statistics_.branches.reserve(2 * statistics_.branches.size());
    for (const auto& other : branches_) {
      for (BranchStatistics& known : statistics_.branches) {
        if (other->statistics != nullptr && known.name == other->name) other->statistics = &known;
      }
    }
  }
  BranchStatistics& fresh = statistics_.branches.emplace_back();
  fresh.name = branch.name;
  fresh.computed.reserve(steps);
  fresh.distance.reserve(steps);
  fresh.seconds.reserve(steps);
  fresh.mix.reserve(steps * static_cast<std::size_t>(statistics_.depth));
  branch.statistics = &fresh;
}

Status Session::Impl::compute_tables(const std::vector<double>& timesteps) {
  if (timesteps == timesteps_ && !tables_.empty()) return {};
  const Timed timed(statistics_, Segment::kPrepare);
  Memory& memory = model_->memory();
  const auto steps = static_cast<std::int64_t>(timesteps.size());
  tables_.clear();
  BufferSet buffers;
  Tensors values;
  const std::vector<float> host(timesteps.begin(), timesteps.end());
  Io io;
  io.shape = {steps};
  FREEWHEEL_TRY(buffers.allocate(memory, "timesteps", io, {}, values));
  FREEWHEEL_TRY(
      memory.upload(values.at("timesteps").data, host.data(), host.size() * sizeof(float)));
  for (const auto& [name, graph] : manifest().graphs) {
    if (graph.runs != "run") continue;
    FREEWHEEL_TRY(buffers.allocate(memory, graph.outputs, {{"steps", steps}}, values));
    FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call, model_->bind(name, values));
    FREEWHEEL_TRY(call->run());
    FREEWHEEL_TRY(memory.synchronize());
  }
  for (Row& row : rows_) {
    row.table = values.at(row.name);
    if (row.table.bytes() != row.row.bytes() * static_cast<std::size_t>(steps)) {
      return Status(Code::kBundle, "table '" + row.name + "'",
                    "has rows of another size than the graphs that read them",
                    "build the bundle again");
    }
  }
  table_buffers_ = std::move(buffers);
  tables_ = std::move(values);
  timesteps_ = timesteps;
  return {};
}

Status Session::Impl::set_prompt(const std::string& branch_name, const Tensors& states) {
  std::vector<Buffer> buffers;
  Tensors given;
  std::vector<std::string> wanted;
  for (const auto& [name, entry] : manifest().inputs) {
    if (entry.runs == "prompt") wanted.push_back(name);
  }
  for (const std::string& name : wanted) {
    const InputEntry& entry = manifest().inputs.at(name);
    const auto state = states.find(name);
    if (state == states.end() || state->second.data == nullptr) {
      return Status(Code::kRequest, "branch '" + branch_name + "', input '" + name + "'",
                    "is missing", "give " + joined(wanted));
    }
    auto dims = match_dims(name, entry, state->second.shape);
    if (!dims.ok()) return std::move(dims).status();
    FREEWHEEL_ASSIGN(Buffer buffer,
                     Buffer::create(host_memory(), entry.dtype, state->second.shape));
    FREEWHEEL_TRY(convert(state->second, buffer.view()));
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

Status Session::Impl::place(const NamedTensor* inputs, std::size_t count) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    bool fits = head_ != nullptr;
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
          model_->memory().upload(wanted.buffer.data, given->tensor.data, given->tensor.bytes()));
    }
    if (fits) return {};
    FREEWHEEL_TRY(allocate(inputs, count));
  }
  return Status(Code::kInternal, "inputs", "don't fit the buffers made for them");
}

Status Session::Impl::allocate(const NamedTensor* inputs, std::size_t count) {
  const Timed timed(statistics_, Segment::kPrepare);
  Dims sizes;
  for (const StepInput& wanted : step_inputs_) {
    const NamedTensor* given = std::find_if(
        inputs, inputs + count, [&](const NamedTensor& i) { return i.name == wanted.name; });
    FREEWHEEL_ASSIGN(const Dims found, match_dims(wanted.name, *wanted.entry, given->tensor.shape));
    for (const auto& [dim, size] : found) sizes[dim] = size;
  }
  FREEWHEEL_ASSIGN(Dims dims, derive_dims(manifest(), sizes));
  for (const auto& branch : branches_) branch->unbind();
  head_.reset();
  shared_.clear();
  shared_buffers_ = {};
  Memory& memory = model_->memory();
  BufferSet buffers;
  Tensors shared = rows_views_;
  for (const StepInput& input : step_inputs_) {
    FREEWHEEL_TRY(buffers.allocate(memory, input.name, *input.entry, dims, shared));
  }
  const auto& outputs = manifest().graphs.at("head").outputs;
  const auto hidden = outputs.find("hidden");
  if (hidden == outputs.end()) {
    return Status(Code::kBundle, "graph 'head'", "does not output 'hidden'",
                  "build the bundle again");
  }
  for (const char* name : {"hidden", "hidden_even", "hidden_odd"}) {
    FREEWHEEL_TRY(buffers.allocate(memory, name, hidden->second, dims, shared));
  }
  for (const auto& [name, graph] : manifest().graphs) {
    if (graph.runs != "shape") continue;
    FREEWHEEL_TRY(buffers.allocate(memory, graph.outputs, dims, shared));
    FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call, model_->bind(name, shared));
    FREEWHEEL_TRY(call->run());
    FREEWHEEL_TRY(memory.synchronize());
  }
  FREEWHEEL_ASSIGN(head_, model_->bind("head", shared));
  for (StepInput& input : step_inputs_) input.buffer = shared.at(input.name);
  shared_buffers_ = std::move(buffers);
  shared_ = std::move(shared);
  dims_ = std::move(dims);
  return {};
}

Status Session::Impl::bind_branch(Branch& branch) {
  if (branch.body == nullptr) {
    const Timed timed(statistics_, Segment::kPrepare);
    FREEWHEEL_ASSIGN(std::unique_ptr<Body> body,
                     Body::create(*model_, branch.name, shared_, branch.prompt, dims_));
    FREEWHEEL_TRY(body->set_prompt(branch.prompt));
    Tensors values = body->values();
    values["hidden_out"] = body->hidden_out();
    BufferSet outputs;
    FREEWHEEL_TRY(outputs.allocate(model_->memory(), manifest().graphs.at("finish").outputs,
                                   body->dims(), values));
    FREEWHEEL_ASSIGN(std::unique_ptr<BoundCall> finish, model_->bind("finish", values));
    const auto output = values.find("model_output");
    if (output == values.end() || output->second.dtype != DType::kFloat32) {
      return Status(Code::kBundle, "graph 'finish'", "does not output a float32 'model_output'",
                    "build the bundle again");
    }
    branch.model_output = output->second;
    branch.outputs = std::move(outputs);
    branch.finish = std::move(finish);
    branch.body = std::move(body);
    branch.cache.reset();
  }
  if (branch.cache == nullptr) {
    const Timed timed(statistics_, Segment::kPrepare);
    FREEWHEEL_ASSIGN(std::unique_ptr<BranchCache> cache,
                     BranchCache::create(*model_, resolved_, *branch.body, branch.body->values(),
                                         branch.body->dims()));
    FREEWHEEL_TRY(cache->reset(tables_, statistics_.steps));
    branch.cache = std::move(cache);
  }
  return {};
}

Result<Session::Impl::Branch*> Session::Impl::ready_branch(std::string_view name) {
  for (const auto& branch : branches_) {
    if (branch->name != name) continue;
    if (branch->cache == nullptr) FREEWHEEL_TRY(bind_branch(*branch));
    if (branch->statistics == nullptr) start_statistics(*branch);
    return branch.get();
  }
  return Status(Code::kRequest, "branch '" + std::string(name) + "'", "has no prompt",
                "call set_prompt() first");
}

Status Session::Impl::select_row(std::int64_t step_index) {
  if (step_index == row_) return {};
  for (const Row& row : rows_) {
    const std::size_t bytes = row.row.bytes();
    const auto* source =
        row.table.as<std::uint8_t>() + static_cast<std::size_t>(step_index) * bytes;
    FREEWHEEL_TRY(model_->memory().copy(row.row.data, source, bytes));
  }
  row_ = step_index;
  return {};
}

Status Session::Impl::prepare(const NamedTensor* inputs, std::size_t count) {
  if (timesteps_.empty()) {
    return Status(Code::kRequest, "session", "has no run", "call begin() first");
  }
  FREEWHEEL_TRY(place(inputs, count));
  for (const auto& branch : branches_) {
    if (auto ready = ready_branch(branch->name); !ready.ok()) return std::move(ready).status();
  }
  return {};
}

Result<Tensor> Session::Impl::step(std::string_view name, std::int64_t step_index,
                                   const NamedTensor* inputs, std::size_t count) {
  if (timesteps_.empty()) {
    return Status(Code::kRequest, "session", "has no run", "call begin() first");
  }
  if (cancellation_.is_wanted()) return cancelled();
  FREEWHEEL_TRY(place(inputs, count));
  FREEWHEEL_ASSIGN(Branch * branch, ready_branch(name));
  if (step_index != branch->last_step + 1 || step_index >= statistics_.steps) {
    return Status(Code::kRequest,
                  "branch '" + branch->name + "', step " + std::to_string(step_index),
                  "does not follow step " + std::to_string(branch->last_step) + " of " +
                      std::to_string(statistics_.steps),
                  "call begin() at the start of a run, and steps in order");
  }
  const Clock::time_point began = Clock::now();
  Verdict verdict;
  {
    const Timed timed(statistics_, Segment::kHead);
    FREEWHEEL_TRY(select_row(step_index));
    FREEWHEEL_TRY(head_->run());
  }
  {
    const Timed timed(statistics_, Segment::kDecide);
    FREEWHEEL_ASSIGN(verdict, branch->cache->decide(step_index));
  }
  if (cancellation_.is_wanted()) return cancelled();
  {
    const Timed timed(statistics_, verdict.compute ? Segment::kBody : Segment::kReuse);
    FREEWHEEL_TRY(verdict.compute ? branch->cache->compute(step_index, cancellation_)
                                  : branch->cache->reuse(verdict));
  }
  {
    const Timed timed(statistics_, Segment::kFinish);
    FREEWHEEL_TRY(branch->finish->run());
    FREEWHEEL_TRY(model_->memory().synchronize());
  }
  branch->last_step = step_index;
  BranchStatistics& statistics = *branch->statistics;
  statistics.computed.push_back(verdict.compute ? 1 : 0);
  statistics.distance.push_back(verdict.distance);
  statistics.seconds.push_back(seconds_since(began));
  for (std::int64_t age = 0; age < statistics_.depth; ++age) {
    statistics.mix.push_back(verdict.compute ? 0.0f : verdict.mix[age]);
  }
  return branch->model_output;
}

Status Session::Impl::check_request(const RunRequest& request) const {
  const Tensor& latents = request.latents;
  const auto entry = manifest().inputs.find("latents");
  if (entry == manifest().inputs.end() || step_inputs_.size() != 1) {
    return Status(Code::kRequest, "bundle", "takes other per-step inputs than 'latents'",
                  "drive it with begin(), set_prompt() and step()");
  }
  if (latents.data == nullptr || latents.dtype != DType::kFloat32 || latents.shape.rank() < 2) {
    return Status(Code::kRequest, "input 'latents'", "is no float32 tensor",
                  "give host float32 " + entry->second.text());
  }
  if (!is_finite(latents)) {
    return Status(Code::kRequest, "input 'latents'", "holds values that are not finite",
                  "give standard normal noise");
  }
  for (const auto& [branch, states] : request.prompts) {
    for (const auto& [name, tensor] : states) {
      if (tensor.data != nullptr && !is_finite(tensor)) {
        return Status(Code::kRequest, "branch '" + branch + "', input '" + name + "'",
                      "holds values that are not finite", "encode the prompt again");
      }
    }
  }
  if (!std::isfinite(request.guidance_scale)) {
    return Status(Code::kRequest, "guidance_scale", "is not finite",
                  "give a number, usually 1 to 8");
  }
  const bool wants_uncond = request.guidance_scale > 1.0;
  for (const char* branch : {"cond", "uncond"}) {
    if (request.prompts.count(branch) == 0 && (branch[0] == 'c' || wants_uncond)) {
      return Status(Code::kRequest, std::string("branch '") + branch + "'", "has no prompt",
                    wants_uncond ? "give both prompts, or a guidance scale of 1"
                                 : "give its prompt embeddings");
    }
  }
  return {};
}

Status Session::Impl::run(const RunRequest& request) {
  FREEWHEEL_TRY(check_request(request));
  const double* shift = request.flow_shift ? &*request.flow_shift : nullptr;
  FREEWHEEL_ASSIGN(const SamplerTable table,
                   model_->bundle().sampler(request.sampler, shift, request.steps));
  FREEWHEEL_TRY(begin(table.timesteps, request.cache));
  const bool has_uncond = request.guidance_scale > 1.0;
  for (const char* branch : {"cond", "uncond"}) {
    if (branch[0] == 'c' || has_uncond) {
      FREEWHEEL_TRY(set_prompt(branch, request.prompts.at(branch)));
    }
  }
  return denoise(request, table);
}

Status Session::Impl::denoise(const RunRequest& request, const SamplerTable& table) {
  const bool has_uncond = request.guidance_scale > 1.0;
  const Tensor& latents = request.latents;
  const std::int64_t elements = latents.shape.elements();
  Shape input_shape = latents.shape;
  const bool has_condition = request.condition.data != nullptr;
  if (has_condition) {
    Shape whole;
    bool fits = request.condition.dtype == DType::kFloat32 &&
                request.condition.shape.rank() == latents.shape.rank();
    for (int axis = 0; fits && axis < latents.shape.rank(); ++axis) {
      fits = axis == 1 || request.condition.shape[axis] == latents.shape[axis];
      whole.push_back(latents.shape[axis] + (axis == 1 ? request.condition.shape[axis] : 0));
    }
    if (!fits) {
      return Status(Code::kRequest, "input 'condition'",
                    "has shape " + request.condition.shape.text() + ", the latents have " +
                        latents.shape.text(),
                    "give float32 of the same batch, frames, height and width");
    }
    input_shape = whole;
  }
  // Rings of samples and outputs, the input with its condition, and staging for devices.
  std::vector<Buffer> samples, outputs;
  for (std::int64_t age = 0; age < table.window; ++age) {
    FREEWHEEL_ASSIGN(Buffer sample, Buffer::create(host_memory(), DType::kFloat32, latents.shape));
    FREEWHEEL_ASSIGN(Buffer output, Buffer::create(host_memory(), DType::kFloat32, latents.shape));
    samples.push_back(std::move(sample));
    outputs.push_back(std::move(output));
  }
  Buffer input, staging[2];
  if (has_condition) {
    FREEWHEEL_ASSIGN(input, Buffer::create(host_memory(), DType::kFloat32, input_shape));
  }
  Memory& memory = model_->memory();
  if (!memory.is_host()) {
    for (Buffer& buffer : staging) {
      FREEWHEEL_ASSIGN(buffer, Buffer::create(host_memory(), DType::kFloat32, latents.shape));
    }
  }
  std::memcpy(samples[0].view().data, latents.data, latents.bytes());
  const std::int64_t batch = latents.shape[0];
  const std::size_t sample_bytes = latents.bytes() / static_cast<std::size_t>(batch);
  const std::size_t condition_bytes =
      has_condition ? request.condition.bytes() / static_cast<std::size_t>(batch) : 0;
  const auto assemble = [&](const Tensor& sample) {
    auto* target = input.view().as<std::uint8_t>();
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto at = static_cast<std::size_t>(b);
      std::memcpy(target, sample.as<std::uint8_t>() + at * sample_bytes, sample_bytes);
      std::memcpy(target + sample_bytes,
                  request.condition.as<std::uint8_t>() + at * condition_bytes, condition_bytes);
      target += sample_bytes + condition_bytes;
    }
  };
  std::vector<const float*> past_samples(samples.size()), past_outputs(outputs.size());
  const auto window = static_cast<std::size_t>(table.window);
  std::size_t newest = 0;
  for (std::int64_t step_index = 0; step_index < table.steps(); ++step_index) {
    newest = static_cast<std::size_t>(step_index) % window;
    const Tensor sample = samples[newest].view();
    if (has_condition) assemble(sample);
    const NamedTensor given{"latents", has_condition ? input.view() : sample};
    const float* found[2] = {nullptr, nullptr};
    for (int side = 0; side < (has_uncond ? 2 : 1); ++side) {
      const char* name = side == 0 ? "cond" : "uncond";
      FREEWHEEL_ASSIGN(const Tensor output, step(name, step_index, &given, 1));
      if (output.shape != latents.shape) {
        return Status(
            Code::kRequest, "input 'latents'",
            "has shape " + latents.shape.text() + ", the model gives " + output.shape.text(),
            "give noise of the output's channels, and the rest as 'condition'");
      }
      found[side] = output.as<float>();
      if (!memory.is_host()) {
        FREEWHEEL_TRY(memory.download(staging[side].view().data, output.data, output.bytes()));
        found[side] = staging[side].view().as<float>();
      }
      if (request.on_branch_step) {
        const BranchStatistics& done = *ready_branch(name).value()->statistics;
        request.on_branch_step({name, step_index, statistics_.steps, done.computed.back() != 0,
                                done.distance.back(), done.seconds.back()});
      }
    }
    const Timed timed(statistics_, Segment::kSampler);
    const Tensor output = outputs[newest].view();
    if (has_uncond) {
      guide(found[0], found[1], static_cast<float>(request.guidance_scale), output.as<float>(),
            elements);
    } else {
      std::memcpy(output.data, found[0], output.bytes());
    }
    for (std::size_t age = 0; age < window; ++age) {
      const std::size_t slot = (newest + window - age) % window;
      past_samples[age] = samples[slot].view().as<float>();
      past_outputs[age] = outputs[slot].view().as<float>();
    }
    // The listener sees the sample before the ring may overwrite it (a window of 1 does).
    const Tensor next = samples[(newest + 1) % window].view();
    if (request.on_step) {
      const auto at = static_cast<std::size_t>(step_index);
      request.on_step(
          {step_index, statistics_.steps, table.timesteps[at], table.sigmas[at], sample, output});
    }
    advance(table, step_index, past_samples.data(), past_outputs.data(), next.as<float>(),
            elements);
  }
  const Tensor result = samples[(newest + 1) % window].view();
  if (!is_finite(result)) {
    return Status(Code::kFailed, "latents", "are not finite after the last step",
                  "compare with --cache off, and with a float32 build");
  }
  std::memcpy(latents.data, result.data, latents.bytes());
  return {};
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

Result<std::unique_ptr<Session>> Session::create(std::shared_ptr<Model> model) {
  auto impl = std::make_unique<Impl>(std::move(model));
  FREEWHEEL_TRY(impl->initialise());
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

Model& Session::model() noexcept { return *impl_->model_; }
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

Status Session::begin(const std::vector<double>& timesteps, const CacheSetting& setting) {
  return impl_->begin(timesteps, setting);
}
Status Session::set_prompt(const std::string& branch, const Tensors& states) {
  return impl_->set_prompt(branch, states);
}
Status Session::prepare(const NamedTensor* inputs, std::size_t count) {
  return impl_->prepare(inputs, count);
}
Result<Tensor> Session::step(std::string_view branch, std::int64_t step_index,
                             const NamedTensor* inputs, std::size_t count) {
  return impl_->step(branch, step_index, inputs, count);
}

}  // namespace freewheel

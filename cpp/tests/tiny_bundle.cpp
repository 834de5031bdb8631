// SPDX-License-Identifier: Apache-2.0
#include "tiny_bundle.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>

#include "freewheel/files.h"
#include "freewheel/sampler.h"

namespace freewheel::testing {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::int64_t kSteps[] = {1, 4, 12};

json io(const char* dtype, json shape) { return {{"dtype", dtype}, {"shape", std::move(shape)}}; }

json graph(const char* runs, json inputs, json outputs, json weights = json::object()) {
  return {{"file", "graphs/all.onnx"},     {"runs", runs},
          {"precision", "float32"},        {"inputs", std::move(inputs)},
          {"outputs", std::move(outputs)}, {"weights", std::move(weights)}};
}

json decide_inputs(int history) {
  const json number = io("int64", json::array()), flag = io("bool", json::array());
  return {{"step_index", number},
          {"step_count", number},
          {"computed_steps", io("int64", {history})},
          {"exact", flag},
          {"guard.first_exact", number},
          {"guard_state.reused", number},
          {"guard_state.consecutive", number}};
}

json decide_outputs(int history) {
  const json number = io("int64", json::array());
  return {{"compute", io("bool", json::array())},
          {"mix", io("float32", {history})},
          {"new_guard_state.reused", number},
          {"new_guard_state.consecutive", number}};
}

json limits(int last_exact) {
  return {{"first_exact", 1}, {"last_exact", last_exact}, {"exact_steps", json::array()}};
}

json graphs() {
  const json latents = io("float32", {"batch", 2, "frames", "height", "width"});
  const json hidden = io("float32", {"batch", "tokens", 2});
  const json row = io("float32", {1, 3}), scalar = io("float32", json::array());
  json found;
  found["prompt"] = graph("prompt", {{"text_states", io("float32", {"batch", "text_tokens", 3})}},
                          {{"context", io("float32", {"batch", 1})}});
  found["timestep"] = graph("run", {{"timesteps", io("float32", {"steps"})}},
                            {{"temb", io("float32", {"steps", 3})}});
  found["head"] = graph("step", {{"latents", latents}}, {{"hidden", hidden}});
  const json block_inputs = {
      {"hidden", hidden}, {"temb", row}, {"context", io("float32", {"batch", 1})}};
  const json weights = {{"weight", "blocks.{block}.weight"}};
  found["block"] = graph("block", block_inputs, {{"hidden_out", hidden}}, weights);
  found["block_tapped"] =
      graph("block", block_inputs, {{"hidden_out", hidden}, {"attention_output", hidden}}, weights);
  found["modulate"] = graph("signal", {{"hidden", hidden}}, {{"modulated_input", hidden}});
  found["finish"] =
      graph("step", {{"hidden_out", hidden}, {"latents", latents}}, {{"model_output", latents}});
  found["delta"] =
      graph("computed", {{"hidden", hidden}, {"hidden_out", hidden}}, {{"residual", hidden}});
  found["reuse"] = graph("reused",
                         {{"hidden", hidden},
                          {"history", io("float32", {"slots", "batch", "tokens", 2})},
                          {"mix", io("float32", {"slots"})}},
                         {{"hidden_out", hidden}});
  found["gram"] = graph("computed",
                        {{"history", io("float32", {"slots", "batch", "tokens", 2})},
                         {"factors", io("float32", {"slots", "slots"})}},
                        {{"gram", io("float32", {"slots", "slots"})}});
  found["decide.off"] = graph("decide", decide_inputs(1), decide_outputs(1));
  json inputs = decide_inputs(2), outputs = decide_outputs(2);
  inputs["param.interval"] = io("int64", json::array());
  inputs["state.distance"] = scalar;
  outputs["new_state.distance"] = scalar;
  inputs["timestep"] = inputs["sigma"] = scalar;
  inputs["computed_timesteps"] = inputs["computed_sigmas"] = io("float32", {2});
  found["decide.interval"] = graph("decide", inputs, outputs);
  inputs = decide_inputs(1);
  inputs["feature"] = inputs["previous_feature"] =
      io("float32", {"frames", "tokens_per_frame", "channels"});
  found["decide.motion"] = graph("decide", inputs, decide_outputs(1));
  inputs = decide_inputs(1);
  inputs["signal"] = inputs["previous_signal"] = io("float32", {"rows", "width"});
  found["decide.signal"] = graph("decide", inputs, decide_outputs(1));
  found["first_block_residual"] = graph("probe", {{"hidden", hidden}, {"hidden_out", hidden}},
                                        {{"first_block_residual", hidden}});
  inputs = decide_inputs(1);
  inputs["signal"] = inputs["computed_signal"] = io("float32", {"rows", "width"});
  found["decide.probe"] = graph("decide", inputs, decide_outputs(1));
  inputs["previous_signal"] = io("float32", {"rows", "width"});
  inputs["feature"] = inputs["previous_feature"] =
      io("float32", {"frames", "tokens_per_frame", "channels"});
  json alike = decide_inputs(2);
  alike["gram"] = io("float32", {2, 2});
  found["decide.alike"] = graph("decide", alike, decide_outputs(2));
  found["decide.follow"] = graph("decide", inputs, decide_outputs(1));
  return found;
}

json policy(const char* name, int history, int depth) {
  return {{"graph", std::string("decide.") + name},
          {"spec",
           {{"name", name},
            {"summary", "for tests"},
            {"history", {{"maximum", history}, {"depth", depth}}}}}};
}

json policies() {
  json found = {{"off", policy("off", 1, 0)},       {"interval", policy("interval", 2, 2)},
                {"motion", policy("motion", 1, 1)}, {"signal", policy("signal", 1, 1)},
                {"probe", policy("probe", 1, 1)},   {"follow", policy("follow", 1, 1)},
                {"alike", policy("alike", 2, 2)}};
  found["alike"]["spec"]["kept"] = {"gram"};
  json& interval = found["interval"]["spec"];
  interval["state"] = {
      {"distance", {{"shape", json::array()}, {"dtype", "float32"}, {"initial", 0}}}};
  interval["distance"] = "distance";
  interval["parameters"] = {{"interval",
                             {{"default", 3},
                              {"dtype", "int64"},
                              {"minimum", 1},
                              {"meaning", "steps from one computed step to the next, >= 1"}}},
                            {"steps",
                             {{"default", 1},
                              {"dtype", "int64"},
                              {"minimum", 1},
                              {"meaning", "steps that tables were made for, >= 1"}}}};
  found["motion"]["spec"]["feature"] = "attention_output";
  found["motion"]["spec"]["kept"] = {"previous_feature"};
  found["signal"]["spec"]["signals"] = {"modulated_input"};
  found["signal"]["spec"]["kept"] = {"previous_signal"};
  found["probe"]["spec"]["signals"] = {"first_block_residual"};
  found["probe"]["spec"]["kept"] = {"computed_signal"};
  json& follow = found["follow"]["spec"];
  follow["signals"] = {"latents"};
  follow["feature"] = "model_output";
  follow["kept"] = {"previous_signal", "computed_signal", "previous_feature"};
  follow["one_decision"] = true;
  for (auto& [name, entry] : found.items()) {
    entry["setting"] = {{"policy", name}, {"guard", limits(name == "interval" ? 1 : 0)}};
  }
  return found;
}

/// A call of one of the functions below over bound tensors.
class PlainCall final : public BoundCall {
 public:
  PlainCall(std::string name, Tensors bound, std::shared_ptr<Calls> calls)
      : name_(std::move(name)), bound_(std::move(bound)), calls_(std::move(calls)) {
    for (const char* key : kNames)
      tensors_.push_back(bound_.count(key) ? bound_.at(key) : Tensor{});
  }

  Status run() noexcept override {
    if (calls_->on_call) calls_->on_call(name_);
    Status status = execute();
    if (status.ok() && name_ == calls_->overflows) {
      const Tensor& output = at(name_ == "head"     ? kHidden
                                : name_ == "finish" ? kOutput
                                                    : kHiddenOut);
      output.as<float>()[output.shape.elements() - 1] = std::numeric_limits<float>::infinity();
    }
    return status;
  }

 private:
  Status execute() {
    if (name_ == "prompt") return prompt();
    if (name_ == "timestep") return timestep();
    if (name_ == "head") return ++calls_->head, copy(at(kLatents), at(kHidden));
    if (name_ == "block") return ++calls_->block, block();
    if (name_ == "block_tapped") return ++calls_->tapped, block();
    if (name_ == "modulate") return copy(at(kHidden), at(kModulated));
    if (name_ == "first_block_residual") return difference(kFirstResidual);
    if (name_ == "delta") return ++calls_->delta, difference(kResidual);
    if (name_ == "reuse") return reuse();
    if (name_ == "gram") return gram();
    if (name_ == "finish") return finish();
    return decide();
  }

  static constexpr const char* kNames[] = {"latents",
                                           "hidden",
                                           "hidden_out",
                                           "temb",
                                           "context",
                                           "weight",
                                           "residual",
                                           "history",
                                           "mix",
                                           "model_output",
                                           "text_states",
                                           "timesteps",
                                           "modulated_input",
                                           "attention_output",
                                           "step_index",
                                           "computed_steps",
                                           "exact",
                                           "compute",
                                           "param.interval",
                                           "state.distance",
                                           "new_state.distance",
                                           "feature",
                                           "previous_feature",
                                           "signal",
                                           "previous_signal",
                                           "computed_signal",
                                           "first_block_residual",
                                           "factors",
                                           "gram",
                                           "timestep",
                                           "sigma",
                                           "computed_timesteps",
                                           "computed_sigmas",
                                           "guard.first_exact",
                                           "guard_state.reused",
                                           "new_guard_state.reused",
                                           "new_guard_state.consecutive"};
  enum Key {
    kLatents,
    kHidden,
    kHiddenOut,
    kTemb,
    kContext,
    kWeight,
    kResidual,
    kHistory,
    kMix,
    kOutput,
    kText,
    kTimesteps,
    kModulated,
    kFeatureOut,
    kIndex,
    kComputed,
    kExact,
    kCompute,
    kInterval,
    kDistance,
    kNewDistance,
    kFeature,
    kPreviousFeature,
    kSignal,
    kPreviousSignal,
    kComputedSignal,
    kFirstResidual,
    kFactors,
    kGram,
    kTimestep,
    kSigma,
    kComputedTimesteps,
    kComputedSigmas,
    kFirstExact,
    kReused,
    kNewReused,
    kNewConsecutive
  };

  const Tensor& at(Key key) const { return tensors_[static_cast<std::size_t>(key)]; }
  float* floats(Key key) const { return at(key).as<float>(); }

  static Status copy(const Tensor& from, const Tensor& to) {
    return host_memory().copy(to.data, from.data, from.bytes());
  }

  Status prompt() {
    ++calls_->prompt;
    floats(kContext)[0] = floats(kText)[0] + floats(kText)[1];
    return {};
  }
  Status timestep() {
    for (std::int64_t i = 0; i < at(kTemb).shape.elements(); ++i) {
      floats(kTemb)[i] = 0.001f * floats(kTimesteps)[i / 3];
    }
    return {};
  }
  Status block() {
    for (std::int64_t i = 0; i < at(kHidden).shape.elements(); ++i) {
      floats(kHiddenOut)[i] =
          floats(kHidden)[i] * floats(kWeight)[0] + floats(kTemb)[0] + 0.01f * floats(kContext)[0];
    }
    if (at(kFeatureOut).data != nullptr) return copy(at(kHiddenOut), at(kFeatureOut));
    return {};
  }
  Status difference(Key key) {
    for (std::int64_t i = 0; i < at(kHidden).shape.elements(); ++i) {
      floats(key)[i] = floats(kHiddenOut)[i] - floats(kHidden)[i];
    }
    return {};
  }
  Status reuse() {
    ++calls_->reuse;
    const std::int64_t count = at(kHidden).shape.elements();
    for (std::int64_t i = 0; i < count; ++i) {
      float sum = floats(kHidden)[i];
      for (std::int64_t k = 0; k < at(kMix).shape[0]; ++k) {
        sum += floats(kMix)[k] * floats(kHistory)[k * count + i];
      }
      floats(kHiddenOut)[i] = sum;
    }
    return {};
  }
  Status gram() {
    const std::int64_t slots = at(kFactors).shape[0];
    const std::int64_t count = at(kHistory).shape.elements() / slots;
    std::vector<float> rows(static_cast<std::size_t>(slots * count), 0.0f);
    for (std::int64_t i = 0; i < slots * slots; ++i) {
      for (std::int64_t e = 0; e < count; ++e) {
        rows[static_cast<std::size_t>(i / slots * count + e)] +=
            floats(kFactors)[i] * floats(kHistory)[i % slots * count + e];
      }
    }
    for (std::int64_t i = 0; i < slots * slots; ++i) {
      floats(kGram)[i] = 0.0f;
      for (std::int64_t e = 0; e < count; ++e) {
        floats(kGram)[i] += rows[static_cast<std::size_t>(i / slots * count + e)] *
                            rows[static_cast<std::size_t>(i % slots * count + e)];
      }
    }
    return {};
  }
  Status finish() {
    ++calls_->finish;
    if (calls_->fail_finish) return Status(Code::kFailed, "engine 'finish'", "was told to fail");
    return copy(at(kHiddenOut), at(kOutput));
  }
  Status decide() {
    ++calls_->decide;
    const std::int64_t index = *at(kIndex).as<std::int64_t>();
    bool compute = *at(kExact).as<std::uint8_t>() != 0 || at(kComputed).as<std::int64_t>()[0] < 0 ||
                   index < *at(kFirstExact).as<std::int64_t>();
    if (name_ == "decide.off") compute = true;
    if (at(kInterval).data != nullptr) {
      compute = compute || index % *at(kInterval).as<std::int64_t>() == 0;
      floats(kNewDistance)[0] = compute ? 0.0f : floats(kDistance)[0] + 0.25f;
    }
    if (at(kFeature).data != nullptr) {  // the first step has no feature, the next one no pair
      compute = compute || floats(kPreviousFeature)[0] == 0.0f;
    }
    if (at(kComputedSignal).data != nullptr) {  // far from where the last computed step was
      const float past = floats(kComputedSignal)[0];
      compute = compute || std::fabs(floats(kSignal)[0] - past) > 0.2f * std::fabs(past);
    } else if (at(kSignal).data != nullptr) {
      compute = compute || floats(kPreviousSignal)[0] == 0.0f;
    }
    if (calls_->on_decide) {
      calls_->on_decide(at(kSignal), at(kPreviousSignal), at(kComputedSignal), at(kFeature));
    }
    if (at(kGram).data != nullptr) {
      compute = compute || index % 2 == 0;
      if (calls_->on_gram) calls_->on_gram({floats(kGram), floats(kGram) + 4});
    }
    if (calls_->on_schedule && at(kSigma).data != nullptr) {
      const float* past = floats(kComputedTimesteps);
      const float* levels = floats(kComputedSigmas);
      calls_->on_schedule(
          {floats(kTimestep)[0], floats(kSigma)[0], past[0], levels[0], past[1], levels[1]});
    }
    *at(kCompute).as<std::uint8_t>() = compute ? 1 : 0;
    for (std::int64_t k = 0; k < at(kMix).shape[0]; ++k) floats(kMix)[k] = k == 0 ? 1.0f : 0.0f;
    *at(kNewReused).as<std::int64_t>() = *at(kReused).as<std::int64_t>() + (compute ? 0 : 1);
    *at(kNewConsecutive).as<std::int64_t>() = 0;
    return {};
  }

  std::string name_;
  Tensors bound_;
  std::vector<Tensor> tensors_;
  std::shared_ptr<Calls> calls_;
};

class PlainEngine final : public Engine {
 public:
  PlainEngine(std::string name, EngineRecord record, std::shared_ptr<Calls> calls)
      : Engine(std::move(name), std::move(record)), calls_(std::move(calls)) {}

 protected:
  Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) override {
    return std::unique_ptr<BoundCall>(std::make_unique<PlainCall>(name(), bindings, calls_));
  }

 private:
  std::shared_ptr<Calls> calls_;
};

class PlainBackend final : public Backend {
 public:
  explicit PlainBackend(std::shared_ptr<Calls> calls) : calls_(std::move(calls)) {}
  const char* name() const noexcept override { return "plain"; }
  Memory& memory() noexcept override { return host_memory(); }
  Result<std::shared_ptr<Engine>> load(const std::string& folder) override {
    auto record = EngineRecord::read(folder);
    if (!record.ok()) return std::move(record).status();
    if (Status status = record->require(folder, "plain", "1", "here"); !status.ok()) return status;
    return std::shared_ptr<Engine>(std::make_shared<PlainEngine>(
        fs::path(folder).filename().string(), std::move(record).value(), calls_));
  }
  Result<std::shared_ptr<Engine>> compile(const std::string&, const std::string&,
                                          const std::string&) override {
    return Status(Code::kFailed, "backend 'plain'", "compiles nothing");
  }

 private:
  std::shared_ptr<Calls> calls_;
};

}  // namespace

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (fs::temp_directory_path() / "freewheel-XXXXXX").string();
  path_ = ::mkdtemp(pattern.data());
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void TemporaryFolder::write(const std::string& name, const std::string& text) const {
  const fs::path target = fs::path(path_) / name;
  fs::create_directories(target.parent_path());
  std::ofstream(target, std::ios::binary) << text;
}

json write_tiny_bundle(const TemporaryFolder& folder) {
  json manifest = {
      {"schema_version", 2},
      {"freewheel_version", "0"},
      {"family", "tiny"},
      {"checkpoint", {{"sha256", std::string(64, 'a')}}},
      {"pipeline", json::object()},
      {"precision", "float32"},
      {"weights", "inputs"},
      {"inputs",
       {{"latents",
         {{"dtype", "float32"},
          {"shape", {"batch", 2, "frames", "height", "width"}},
          {"argument", "hidden_states"},
          {"runs", "step"}}},
        {"timesteps",
         {{"dtype", "float32"}, {"shape", {"steps"}}, {"argument", "timestep"}, {"runs", "run"}}},
        {"text_states",
         {{"dtype", "float32"},
          {"shape", {"batch", "text_tokens", 3}},
          {"argument", "encoder_hidden_states"},
          {"runs", "prompt"}}}}},
      {"dims",
       {{"tokens", json::array({json::array({"frames", 1}), json::array({"height", 1}),
                                json::array({"width", 1})})},
        {"tokens_per_frame",
         json::array({json::array({"height", 1}), json::array({"width", 1})})}}},
      {"latent_scale", {{"frames", 4}, {"pixels", 8}}},
      {"graphs", graphs()},
      {"stages",
       {{{"block", "block"},
         {"context", nullptr},
         {"tapped", "block_tapped"},
         {"first", 0},
         {"count", 3},
         {"groups", json::array()}}}},
      {"signals",
       {{"modulated_input", {{"value", "modulated_input"}, {"known", "step"}}},
        {"latents", {{"value", "latents"}, {"known", "step"}}},
        {"first_block_residual", {{"value", "first_block_residual"}, {"known", "step"}}}}},
      {"feature_block", 1},
      {"history_dtype", "float32"},
      {"policies", policies()},
      {"configs",
       {{"plain",
         {{"cache",
           {{"policy", "interval"}, {"parameters", {{"interval", 2}}}, {"guard", limits(0)}}},
          {"generation",
           {{"steps", 4},
            {"height", 32},
            {"width", 48},
            {"frames", 5},
            {"guidance_scale", 2.0},
            {"flow_shift", 1.0},
            {"seed", 9},
            {"text_tokens", 2}}}}}}},
      {"default_config", "plain"},
      {"tensors", json::object()},
      {"engines", json::array()},
      {"samplers",
       {{{"name", "euler"},
         {"scheduler", "FlowMatchEulerDiscreteScheduler"},
         {"flow_shift", 1.0},
         {"window", 1},
         {"steps", kSteps},
         {"file", "samplers/euler-1.safetensors"}}}},
      {"files", json::object()}};
  folder.write("graphs/all.onnx", "portable graphs are not read by the plain backend");
  fs::create_directories(folder.path() + "/weights");
  fs::create_directories(folder.path() + "/samplers");

  std::vector<float> weights = {1.01f, 0.99f, 1.02f};
  Tensors tensors;
  for (int block = 0; block < 3; ++block) {
    tensors["blocks." + std::to_string(block) + ".weight"] = {
        &weights[static_cast<std::size_t>(block)], DType::kFloat32, Shape{1}};
  }
  const std::string weight_path = folder.path() + "/weights/all.safetensors";
  (void)write_safetensors(weight_path, tensors);
  auto written = SafetensorsFile::open(weight_path);
  for (const auto& [name, tensor] : written->tensors) {
    manifest["tensors"][name] = {{"file", "weights/all.safetensors"},
                                 {"dtype", "float32"},
                                 {"shape", {1}},
                                 {"offset", tensor.as<std::uint8_t>() - written->file.data()},
                                 {"bytes", 4}};
  }
  std::vector<std::vector<double>> tables;
  Tensors named;
  tables.reserve(3);
  for (std::int64_t steps : kSteps) {
    std::vector<double>& table = tables.emplace_back();
    for (std::int64_t step = 0; step < steps; ++step) {
      const double sigma = 1.0 - static_cast<double>(step) / static_cast<double>(steps);
      table.insert(table.end(), {1000.0 * sigma, sigma, 1.0, -1.0 / static_cast<double>(steps)});
    }
    named[std::to_string(steps)] = {table.data(), DType::kFloat64, Shape{steps, 4}};
  }
  (void)write_safetensors(folder.path() + "/samplers/euler-1.safetensors", named);

  json set = {{"backend", "plain"}, {"target", "here"}, {"files", json::object()}};
  for (const auto& [name, entry] : manifest["graphs"].items()) {
    json inputs = entry["inputs"];
    for (const auto& [weight, pattern] : entry["weights"].items())
      inputs[weight] = io("float32", {1});
    const json record = {
        {"schema_version", 1},         {"backend", "plain"},     {"version", "1"},
        {"machine", "here"},           {"precision", "float32"}, {"inputs", inputs},
        {"outputs", entry["outputs"]}, {"files", json::object()}};
    folder.write("engines/plain-here/" + name + "/engine.json", record.dump());
    set["files"][name] = "engines/plain-here/" + name;
  }
  manifest["engines"].push_back(set);
  for (const auto& entry : fs::recursive_directory_iterator(folder.path())) {
    if (!entry.is_regular_file()) continue;
    manifest["files"][fs::relative(entry.path(), folder.path()).generic_string()] = {
        {"bytes", entry.file_size()}, {"sha256", std::string(64, '0')}};
  }
  write_manifest(folder, manifest);
  return manifest;
}

void add_sound(json& manifest) {
  json sound = {{"dtype", "float32"}, {"shape", {"batch", "audio_tokens", 3}}};
  manifest["graphs"]["finish"]["outputs"]["audio_model_output"] = sound;
  sound.update({{"argument", "audio_hidden_states"}, {"runs", "step"}});
  manifest["inputs"]["audio_latents"] = sound;
  manifest["inputs"]["audio_places"] = {{"dtype", "float32"},
                                        {"shape", {"audio_tokens"}},
                                        {"argument", "audio_coords"},
                                        {"runs", "prompt"}};
}

void write_manifest(const TemporaryFolder& folder, const json& manifest) {
  folder.write("manifest.json", manifest.dump());
}

std::shared_ptr<Backend> plain_backend(std::shared_ptr<Calls> calls) {
  return std::make_shared<PlainBackend>(std::move(calls));
}

Result<std::shared_ptr<Model>> load_tiny(const TemporaryFolder& folder,
                                         std::shared_ptr<Calls> calls) {
  ModelOptions options;
  options.custom_backend = plain_backend(std::move(calls));
  return Model::load(folder.path(), options);
}

TinyRun::TinyRun(std::int64_t frames, std::int64_t size)
    : latents(static_cast<std::size_t>(2 * frames * size * size)), cond(6, 0.5f), uncond(6, -0.5f) {
  gaussian_noise(7, latents.data(), static_cast<std::int64_t>(latents.size()));
  request.latents = {latents.data(), DType::kFloat32, Shape{1, 2, frames, size, size}};
  request.prompts["cond"]["text_states"] = {cond.data(), DType::kFloat32, Shape{1, 2, 3}};
  request.prompts["uncond"]["text_states"] = {uncond.data(), DType::kFloat32, Shape{1, 2, 3}};
  request.steps = 12;
  request.guidance_scale = 2.0;
}

}  // namespace freewheel::testing

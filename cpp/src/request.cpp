// SPDX-License-Identifier: Apache-2.0
#include "freewheel/request.h"

#include <algorithm>
#include <cmath>
#include <variant>

#include "freewheel/codec.h"
#include "freewheel/dims.h"
#include "freewheel/sampler.h"
#include "freewheel/settings.h"
#include "limits.h"
#include "promise.h"
#include "resolved_setting.h"
#include "try.h"

namespace freewheel {
namespace {

using Field = std::variant<std::string*, std::optional<std::int64_t>*,
                           std::optional<std::uint64_t>*, std::optional<double>*, bool*>;

std::map<std::string, Field> fields_of(Request& request) {
  return {{"policy", &request.cache},
          {"sampler", &request.sampler},
          {"lora", &request.lora},
          {"steps", &request.steps},
          {"seed", &request.seed},
          {"frames", &request.frames},
          {"height", &request.height},
          {"width", &request.width},
          {"guidance_scale", &request.guidance_scale},
          {"guidance_scale_2", &request.guidance_scale_2},
          {"flow_shift", &request.flow_shift},
          {"force", &request.force}};
}

Status wrong(const std::string& name, const std::string& found, const std::string& expected) {
  return Status(Code::kRequest, name, "is " + found, "give " + expected);
}

Status wrong_seed(const std::string& found) {
  return wrong("seed", found, "a whole number from 0 to " + std::to_string(kMaxSeed));
}

/// Assigns a value to the field of its kind; what a field's numbers may be is checked by the run.
struct Assign {
  const std::string& name;
  const Value& value;

  Status operator()(std::string* field) const {
    const auto* text = std::get_if<std::string>(&value);
    if (text == nullptr) return wrong(name, value_text(value), "a name");
    *field = *text;
    return {};
  }
  Status operator()(bool* field) const {
    const auto* flag = std::get_if<bool>(&value);
    if (flag == nullptr) return wrong(name, value_text(value), "true or false");
    *field = *flag;
    return {};
  }
  Status operator()(std::optional<std::int64_t>* field) const {
    const auto* whole = std::get_if<std::int64_t>(&value);
    if (whole == nullptr) return wrong(name, value_text(value), "a whole number");
    *field = *whole;
    return {};
  }
  Status operator()(std::optional<std::uint64_t>* field) const {
    const auto* whole = std::get_if<std::int64_t>(&value);
    if (whole == nullptr || *whole < 0) return wrong_seed(value_text(value));
    *field = static_cast<std::uint64_t>(*whole);
    return {};
  }
  Status operator()(std::optional<double>* field) const {
    const auto* whole = std::get_if<std::int64_t>(&value);
    const auto* number = std::get_if<double>(&value);
    if (whole == nullptr && number == nullptr) return wrong(name, value_text(value), "a number");
    *field = whole != nullptr ? static_cast<double>(*whole) : *number;
    return {};
  }
};

std::int64_t side_count(const RunRequest& run) noexcept { return run.is_guided() ? 2 : 1; }

/// What a request asks for, where it says, and else what its config has.
GenerationDefaults asked_of(const Request& request, const GenerationDefaults& defaults) {
  GenerationDefaults asked = defaults;
  asked.steps = request.steps.value_or(defaults.steps);
  asked.height = request.height.value_or(defaults.height);
  asked.width = request.width.value_or(defaults.width);
  asked.frames = request.frames.value_or(defaults.frames);
  asked.guidance_scale = request.guidance_scale.value_or(defaults.guidance_scale);
  asked.flow_shift = request.flow_shift.value_or(defaults.flow_shift);
  if (!request.sampler.empty()) asked.sampler = request.sampler;
  return asked;
}

/// The per-prompt inputs that a bundle takes.
std::vector<std::string> prompt_inputs(const Manifest& manifest) {
  std::vector<std::string> names;
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs == "prompt") names.push_back(name);
  }
  return names;
}

/// Checks that the model takes these latents and gives its output in their shape.
Status check_shapes(const Manifest& manifest, const Io& declared, const RunRequest& request) {
  FREEWHEEL_ASSIGN(const Shape whole, request.input_shape());
  FREEWHEEL_ASSIGN(const Dims found, match_dims("latents", declared, whole));
  FREEWHEEL_ASSIGN(const Dims dims, derive_dims(manifest, found));
  const Io& output = manifest.graphs.at("finish").outputs.at("model_output");
  FREEWHEEL_ASSIGN(const Shape given, shape_of("model_output", output, dims));
  if (given == request.latents.shape) return {};
  return Status(Code::kRequest, "input 'latents'",
                "has shape " + request.latents.shape.text() + ", the model gives " + given.text(),
                "give noise of the output's channels, and the rest as 'condition'");
}

Status check_finite(const Tensor& tensor, const std::string& where, const char* hint) {
  if (tensor.data == nullptr || is_finite(tensor)) return {};
  return Status(Code::kRequest, where, "holds values that are not finite", hint);
}

/// Checks that each branch that runs has a prompt, and what is in those that were given.
Status check_prompts(const Manifest& manifest, const RunRequest& request) {
  for (std::int64_t side = 0; side < side_count(request); ++side) {
    if (request.prompts.count(kSides[side]) != 0) continue;
    return Status(Code::kRequest, std::string("branch '") + kSides[side] + "'", "has no prompt",
                  request.is_guided() ? "give both prompts, or a guidance scale of 1"
                                      : "give its prompt embeddings");
  }
  const std::vector<std::string> known = prompt_inputs(manifest);
  for (const auto& [branch, states] : request.prompts) {
    if (std::find(std::begin(kSides), std::end(kSides), branch) == std::end(kSides)) {
      return Status(Code::kRequest, "branch '" + branch + "'", "is not one of a run",
                    nearest(branch, {std::begin(kSides), std::end(kSides)}));
    }
    for (const auto& [name, tensor] : states) {
      const std::string where = "branch '" + branch + "', input '" + name + "'";
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        return Status(Code::kRequest, where, "is not one that this bundle takes",
                      nearest(name, known));
      }
      FREEWHEEL_TRY(check_finite(tensor, where, "encode the prompt again"));
    }
    FREEWHEEL_TRY(check_prompt(manifest, branch, states));
  }
  return {};
}

Status check_pixels(const Request& request, std::int64_t frames, std::int64_t height,
                    std::int64_t width) {
  const std::int64_t most = request.max_pixels;
  const bool is_known = height > 0 && width > 0;
  if (!is_known || (height <= most / width && frames <= most / (height * width))) return {};
  return Status(Code::kRequest, "size",
                std::to_string(frames) + " frames of " + std::to_string(height) + " x " +
                    std::to_string(width) + " are more than the " + std::to_string(most) +
                    " pixels that are served",
                "ask for less, or have 'max_pixels' raised where the model is served");
}

/// Checks the size of latents that were given, where their shape tells frames, height and width.
Status check_given_size(const Manifest& manifest, const Request& request) {
  const Io& output = manifest.graphs.at("finish").outputs.at("model_output");
  const auto sizes = match_dims("latents", output, request.latents.shape);
  if (!sizes.ok()) return {};  // `check_run` says so better
  const auto size = [&](const char* name, std::int64_t scale) {
    const auto found = sizes->find(name);
    return found == sizes->end() ? 0 : found->second * scale;
  };
  const LatentScale& scale = manifest.latent_scale;
  const std::int64_t frames = size("frames", 1);
  return check_pixels(request, frames == 0 ? 0 : (frames - 1) * scale.frames + 1,
                      size("height", scale.pixels), size("width", scale.pixels));
}

/// Copies the latents that were given: a run overwrites its own.
Status take_latents(const Manifest& manifest, const Request& request, PreparedRun& prepared) {
  const bool has_size = request.frames || request.height || request.width;
  if (request.seed || has_size) {
    return Status(Code::kRequest, "input 'latents'",
                  request.seed ? "comes with a seed" : "comes with a size", "give one of them");
  }
  FREEWHEEL_TRY(check_given_size(manifest, request));
  FREEWHEEL_ASSIGN(Buffer latents,
                   Buffer::create(host_memory(), DType::kFloat32, request.latents.shape));
  FREEWHEEL_TRY(convert(request.latents, latents.view()));
  prepared.run.latents = latents.view();
  prepared.buffers.push_back(std::move(latents));
  return {};
}

Status draw_latents(const Shape& shape, std::uint64_t seed, PreparedRun& prepared) {
  if (seed > static_cast<std::uint64_t>(kMaxSeed)) return wrong_seed(std::to_string(seed));
  FREEWHEEL_ASSIGN(Buffer latents, Buffer::create(host_memory(), DType::kFloat32, shape));
  gaussian_noise(seed, latents.view().as<float>(), shape.elements());
  prepared.run.latents = latents.view();
  prepared.buffers.push_back(std::move(latents));
  prepared.seed = seed;
  return {};
}

/// Gives the run its latents, once their size is known to be one that may run.
Status settle_latents(const Manifest& manifest, const Request& request,
                      const GenerationDefaults& defaults, PreparedRun& prepared) {
  Shape shape = request.latents.shape;
  if (request.latents.data == nullptr && shape.rank() == 0) {
    FREEWHEEL_ASSIGN(shape, requested_shape(manifest, request));
  }
  FREEWHEEL_ASSIGN(std::string warning,
                   check_geometry(manifest, request.cache, shape, request.force));
  if (!warning.empty()) prepared.run.warnings.push_back(std::move(warning));
  if (request.latents.data != nullptr) return take_latents(manifest, request, prepared);
  const auto seed = request.seed.value_or(static_cast<std::uint64_t>(defaults.seed));
  return draw_latents(shape, seed, prepared);
}

using TokenIds = std::map<std::string, std::vector<std::int64_t>>;

/// Returns the token ids of every branch that comes with ids or with text.
Result<TokenIds> all_token_ids(Model& model, const Request& request, bool is_guided) {
  TokenIds found = request.token_ids;
  std::map<std::string, std::string> texts = request.texts;
  const auto has_none = [&](const char* branch) {
    return found.count(branch) + request.prompts.count(branch) + texts.count(branch) == 0;
  };
  if (is_guided && texts.count("cond") != 0 && has_none("uncond")) texts["uncond"] = "";
  for (const auto& [branch, text] : texts) {
    if (found.count(branch) != 0) {
      return Status(Code::kRequest, "branch '" + branch + "'", "comes as text and as token ids",
                    "give one of them");
    }
    FREEWHEEL_ASSIGN(found[branch], model.token_ids(text));
  }
  return found;
}

/// Gives branches their prompts. Token ids are checked; their states are null until `encode`.
Status settle_prompts(const Manifest& manifest, const Request& request, const TokenIds& token_ids,
                      std::int64_t text_tokens, RunRequest& run) {
  run.prompts = request.prompts;
  for (const auto& [branch, ids] : token_ids) {
    FREEWHEEL_TRY(check_token_ids(manifest, ids, text_tokens));
    const std::string input = text_input(manifest);
    if (!run.prompts[branch].emplace(input, Tensor{}).second) {
      return Status(Code::kRequest, "branch '" + branch + "', input '" + input + "'",
                    "comes with the prompt's text or token ids", "give one of them");
    }
  }
  const auto cond = run.prompts.find("cond");
  const auto uncond = run.prompts.find("uncond");
  if (cond == run.prompts.end() || uncond == run.prompts.end()) return {};
  for (const auto& [name, tensor] : cond->second) {
    if (!is_text(name)) uncond->second.emplace(name, tensor);
  }
  return {};
}

/// Encodes the prompts that are token ids.
Status encode(Model& model, const TokenIds& token_ids, std::int64_t text_tokens,
              PreparedRun& prepared) {
  for (const auto& [branch, ids] : token_ids) {
    const auto states = prepared.run.prompts.find(branch);
    if (states == prepared.run.prompts.end()) continue;  // a branch that does not run
    FREEWHEEL_ASSIGN(Buffer encoded, encode_tokens(model, ids, text_tokens));
    states->second[text_input(model.manifest())] = encoded.view();
    prepared.buffers.push_back(std::move(encoded));
  }
  return {};
}

}  // namespace

Status Request::set(const std::string& name, const Value& value) {
  const std::map<std::string, Field> fields = fields_of(*this);
  const auto field = fields.find(name);
  if (field == fields.end()) {
    return Status(Code::kRequest, "parameter '" + name + "'", "is none of a request",
                  nearest(name, names()));
  }
  if (std::holds_alternative<std::string*>(field->second)) {
    return std::visit(Assign{name, value}, field->second);
  }
  FREEWHEEL_ASSIGN(const Value meant, spelled(value));
  return std::visit(Assign{name, meant}, field->second);
}

const std::vector<std::string>& Request::names() {
  static const std::vector<std::string> known = [] {
    Request request;
    std::vector<std::string> found;
    for (const auto& [name, field] : fields_of(request)) found.push_back(name);
    return found;
  }();
  return known;
}

Result<Shape> RunRequest::input_shape() const {
  if (condition.data == nullptr) return latents.shape;
  bool fits = condition.dtype == DType::kFloat32 && condition.shape.rank() == latents.shape.rank();
  Shape whole;
  for (int axis = 0; fits && axis < latents.shape.rank(); ++axis) {
    const std::int64_t size = latents.shape[axis], more = condition.shape[axis];
    fits = axis == 1 ? more > 0 : more == size;
    whole.push_back(axis == 1 ? size + more : size);
  }
  if (fits) return whole;
  return Status(
      Code::kRequest, "input 'condition'",
      "has shape " + condition.shape.text() + ", the latents have " + latents.shape.text(),
      "give float32 of the same batch, frames, height and width");
}

Status check_prompt(const Manifest& manifest, const std::string& branch, const Tensors& states) {
  const std::vector<std::string> wanted = prompt_inputs(manifest);
  for (const std::string& name : wanted) {
    const auto state = states.find(name);
    if (state == states.end()) {
      std::string listed;
      for (const std::string& other : wanted) listed += (listed.empty() ? "" : ", ") + other;
      return Status(Code::kRequest, "branch '" + branch + "', input '" + name + "'", "is missing",
                    "give " + listed);
    }
    if (state->second.data == nullptr) continue;
    const auto dims = match_dims(name, manifest.inputs.at(name), state->second.shape);
    if (!dims.ok()) return dims.status();
  }
  return {};
}

Status check_run(const Bundle& bundle, const RunRequest& request) {
  const Manifest& manifest = bundle.manifest();
  const Tensor& latents = request.latents;
  const auto entry = manifest.inputs.find("latents");
  const auto step_inputs =
      std::count_if(manifest.inputs.begin(), manifest.inputs.end(),
                    [](const auto& input) { return input.second.runs == "step"; });
  if (entry == manifest.inputs.end() || step_inputs != 1) {
    return Status(Code::kRequest, "bundle", "takes other per-step inputs than 'latents'",
                  "drive it with begin(), set_prompt() and step()");
  }
  if (!std::isfinite(request.guidance_scale) ||
      !std::isfinite(request.guidance_scale_2.value_or(1.0))) {
    return Status(Code::kRequest, "guidance_scale", "is not finite",
                  "give a number, usually 1 to 8");
  }
  if (request.guidance_scale_2 && manifest.experts.size() < 2) {
    return Status(Code::kRequest, "guidance_scale_2", "is given, and the bundle has one expert",
                  "leave it out");
  }
  const double* shift = request.flow_shift ? &*request.flow_shift : nullptr;
  FREEWHEEL_ASSIGN([[maybe_unused]] const auto table,
                   bundle.sampler(request.sampler, shift, request.steps));
  FREEWHEEL_ASSIGN([[maybe_unused]] const auto setting,
                   ResolvedSetting::for_all_branches(manifest, request.cache));
  FREEWHEEL_ASSIGN([[maybe_unused]] const auto loras, open_loras(bundle, request.loras));
  FREEWHEEL_TRY(check_prompts(manifest, request));
  if (latents.data == nullptr || latents.dtype != DType::kFloat32 || latents.shape.rank() < 2) {
    return Status(Code::kRequest, "input 'latents'", "is no float32 tensor",
                  "give host float32 " + entry->second.text());
  }
  FREEWHEEL_TRY(check_shapes(manifest, entry->second, request));
  FREEWHEEL_TRY(check_finite(latents, "input 'latents'", "give standard normal noise"));
  return check_finite(request.condition, "input 'condition'", "encode the picture again");
}

Result<Shape> requested_shape(const Manifest& manifest, const Request& request) {
  FREEWHEEL_ASSIGN(const ConfigEntry config, find_config(manifest, request.cache));
  const GenerationDefaults& defaults = config.generation;
  const std::int64_t frames = request.frames.value_or(defaults.frames);
  const std::int64_t height = request.height.value_or(defaults.height);
  const std::int64_t width = request.width.value_or(defaults.width);
  FREEWHEEL_ASSIGN(const Shape shape, latent_shape(manifest, frames, height, width));
  FREEWHEEL_TRY(check_pixels(request, frames, height, width));
  return shape;
}

Result<PreparedRun> prepare_run(Model& model, const Request& request) {
  const Manifest& manifest = model.manifest();
  FREEWHEEL_ASSIGN(ConfigEntry config, find_config(manifest, request.cache));
  FREEWHEEL_TRY(apply_overrides(manifest, request.overrides, request.also_known, config.cache));
  const GenerationDefaults& defaults = config.generation;
  FREEWHEEL_TRY(check_bound_values(config.cache, defaults, asked_of(request, defaults)));
  PreparedRun prepared;
  RunRequest& run = prepared.run;
  run.cache = std::move(config.cache);
  run.steps = request.steps.value_or(defaults.steps);
  run.guidance_scale = request.guidance_scale.value_or(defaults.guidance_scale);
  // A request's guidance is that of both experts, unless it names the second's too.
  run.guidance_scale_2 = request.guidance_scale || request.guidance_scale_2
                             ? request.guidance_scale_2
                             : defaults.guidance_scale_2;
  run.flow_shift = request.flow_shift.value_or(defaults.flow_shift);
  run.sampler = request.sampler.empty() ? defaults.sampler : request.sampler;
  run.condition = request.condition;
  FREEWHEEL_ASSIGN(run.loras, find_loras(model.lora_folder(), request.lora));
  FREEWHEEL_ASSIGN(const TokenIds token_ids, all_token_ids(model, request, run.is_guided()));
  FREEWHEEL_TRY(settle_prompts(manifest, request, token_ids, defaults.text_tokens, run));
  FREEWHEEL_TRY(settle_latents(manifest, request, defaults, prepared));
  if (request.decodes) FREEWHEEL_TRY(check_decodes(manifest, run.latents.shape));
  FREEWHEEL_TRY(check_run(model.bundle(), run));
  if (!run.is_guided()) run.prompts.erase("uncond");
  FREEWHEEL_TRY(encode(model, token_ids, defaults.text_tokens, prepared));
  return prepared;
}

}  // namespace freewheel

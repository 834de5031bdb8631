// SPDX-License-Identifier: Apache-2.0
#include "freewheel/request.h"

#include <algorithm>
#include <cmath>
#include <variant>

#include "freewheel/codec.h"
#include "freewheel/dims.h"
#include "freewheel/settings.h"
#include "limits.h"
#include "promise.h"
#include "request_latents.h"
#include "resolved_setting.h"
#include "streams.h"
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

/// The latents beside the first whose guidance scale goes by this name, or nothing.
std::string latents_of_scale(const std::string& name) {
  constexpr std::string_view kScale = "guidance_scale";
  if (name.size() <= kScale.size() + 1) return {};
  const std::size_t at = name.size() - kScale.size();
  if (name.compare(at, kScale.size(), kScale) != 0 || name[at - 1] != '_') return {};
  return name.substr(0, at) + kLatents;
}

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

/// Checks the guidance scales of all that is sampled.
Status check_guidance(const Manifest& manifest, const RunRequest& request) {
  for (std::size_t expert = 0; expert < 2; ++expert) {
    for (const std::string& latents : manifest.latents()) {
      if (std::isfinite(request.scale_of(latents, expert))) continue;
      return Status(Code::kRequest, beside(latents, kLatents, "guidance_scale"), "is not finite",
                    "give a number, usually 1 to 8");
    }
  }
  if (request.guidance_scale_2 && manifest.experts.size() < 2) {
    return Status(Code::kRequest, "guidance_scale_2", "is given, and the bundle has one expert",
                  "leave it out");
  }
  return {};
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
  if (const std::string latents = latents_of_scale(name); !latents.empty()) {
    FREEWHEEL_ASSIGN(const Value meant, spelled(value));
    return Assign{name, meant}(&beside[latents].guidance_scale);
  }
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

bool Request::knows(const std::string& name) {
  const auto& known = names();
  return std::find(known.begin(), known.end(), name) != known.end() ||
         !latents_of_scale(name).empty();
}

bool RunRequest::is_guided() const noexcept {
  const auto guides = [](const auto& named) {
    return named.second.guidance_scale.value_or(1.0) > 1.0;
  };
  return guidance_scale > 1.0 || std::any_of(beside.begin(), beside.end(), guides);
}

double RunRequest::scale_of(const std::string& name, std::size_t expert) const noexcept {
  const auto other = beside.find(name);
  if (other != beside.end() && other->second.guidance_scale) return *other->second.guidance_scale;
  return expert == 0 ? guidance_scale : guidance_scale_2.value_or(guidance_scale);
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
  FREEWHEEL_TRY(check_guidance(manifest, request));
  const double* shift = request.flow_shift ? &*request.flow_shift : nullptr;
  for (const std::string& latents : manifest.latents()) {
    FREEWHEEL_ASSIGN([[maybe_unused]] const auto table,
                     bundle.sampler(request.sampler, shift, request.steps, latents));
  }
  FREEWHEEL_ASSIGN([[maybe_unused]] const auto setting,
                   ResolvedSetting::for_all_branches(manifest, request.cache));
  FREEWHEEL_ASSIGN([[maybe_unused]] const auto loras, open_loras(bundle, request.loras));
  FREEWHEEL_TRY(check_prompts(manifest, request));
  return check_latents(manifest, request);
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
  for (const auto& [name, asked] : request.beside) {
    run.beside[name].guidance_scale = asked.guidance_scale;
  }
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

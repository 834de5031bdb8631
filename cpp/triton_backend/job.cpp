// SPDX-License-Identifier: Apache-2.0
#include "job.h"

#include <algorithm>
#include <cmath>

#include "freewheel/codec.h"
#include "freewheel/sampler.h"
#include "freewheel/settings.h"
#include "try.h"

namespace freewheel::triton {
namespace {

Tensor with_batch(Tensor tensor) {
  Shape shape{1};
  for (const std::int64_t size : tensor.shape) shape.push_back(size);
  tensor.shape = shape;
  return tensor;
}

const Tensor* find(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &found->second;
}

bool is_text(const std::string& name) { return name.find("text") != std::string::npos; }

/// Refuses tensors that nothing reads.
Status check_names(const Manifest& manifest, const Tensors& tensors) {
  std::vector<std::string> known = {kSeed, kLatents, kCondition};
  if (can_encode(manifest)) known.insert(known.end(), {kTokenIds, kNegativeTokenIds});
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs != "prompt") continue;
    known.push_back(name);
    known.push_back(kNegative + name);
  }
  for (const auto& [name, tensor] : tensors) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      return Status(Code::kRequest, "input '" + name + "'", "is not one that this bundle takes",
                    nearest(name, known));
    }
  }
  return {};
}

/// Applies the overrides, naming every known parameter where one is not. `policy.` before a name
/// tells a policy's parameter from a request's, such as the `steps` of a table of ratios.
Status apply(const Manifest& manifest, const Parameters& overrides, CacheSetting& setting) {
  FREEWHEEL_ASSIGN(const PolicyEntry* policy, carried_policy(manifest, setting.policy));
  const PolicySpec& spec = policy->spec;
  const std::string prefix = "policy.";
  std::vector<std::string> known = override_names(spec, setting.guard);
  for (const auto& [given, value] : overrides) {
    const bool has_prefix = given.rfind(prefix, 0) == 0;
    const std::string name = has_prefix ? given.substr(prefix.size()) : given;
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      for (std::string& option : RequestOptions::names()) known.push_back(std::move(option));
      return Status(Code::kConfig, "parameter '" + given + "'",
                    "is none of a request, nor of policy '" + spec.name + "'",
                    nearest(name, std::move(known)));
    }
    FREEWHEEL_TRY(apply_override(name, value, spec, setting));
  }
  return {};
}

/// A prompt that came as token ids, and where its states belong.
struct Ids {
  std::string branch, input;
  std::vector<std::int64_t> ids;
};

/// Gives a branch its prompt: states, and what else is computed once per prompt. Token ids are
/// checked, and wait to be encoded: their states are null.
Status take_prompt(const Manifest& manifest, const std::string& branch, std::int64_t text_tokens,
                   const Tensors& tensors, Job& job, std::vector<Ids>& waiting) {
  const bool is_negative = branch == "uncond";
  const std::string prefix = is_negative ? kNegative : "";
  const Tensor* ids = find(tensors, is_negative ? kNegativeTokenIds : kTokenIds);
  Tensors states;
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs != "prompt") continue;
    const Tensor* given = find(tensors, prefix + name);
    // A picture belongs to both branches; text does not.
    if (given == nullptr && is_negative && !is_text(name)) given = find(tensors, name);
    if (given != nullptr) states[name] = with_batch(*given);
    if (ids == nullptr || !is_text(name)) continue;
    if (given != nullptr) {
      return Status(Code::kRequest, "input '" + prefix + name + "'", "comes with token ids",
                    "give one of them");
    }
    const auto* first = ids->as<std::int64_t>();
    waiting.push_back({branch, name, {first, first + ids->shape.elements()}});
    FREEWHEEL_TRY(check_token_ids(manifest, waiting.back().ids, text_tokens));
    states[name] = Tensor{};
  }
  if (!states.empty()) job.run.prompts[branch] = std::move(states);
  return {};
}

/// The latents' shape for the size asked for.
Result<Shape> served_shape(const Manifest& manifest, const ServedOptions& served,
                           const RequestOptions& options, const GenerationDefaults& defaults) {
  const std::int64_t frames = options.frames.value_or(defaults.frames);
  const std::int64_t height = options.height.value_or(defaults.height);
  const std::int64_t width = options.width.value_or(defaults.width);
  // Parameters fit 32 bits, so that a product of two fits 64.
  const bool fits =
      height <= served.max_pixels / width && frames <= served.max_pixels / (height * width);
  if (!fits) {
    return Status(Code::kRequest, "size",
                  std::to_string(frames) + " frames of " + std::to_string(height) + " x " +
                      std::to_string(width) + " are more than the " +
                      std::to_string(served.max_pixels) + " pixels that this model serves",
                  "ask for less, or raise 'max_pixels' in its config.pbtxt");
  }
  return latent_shape(manifest, frames, height, width);
}

/// Copies the given latents, which the run overwrites.
Status take_latents(const Tensor& given, const RequestOptions& options, Job& job) {
  const bool has_size = options.height || options.width || options.frames;
  if (options.seed || has_size) {
    return Status(Code::kRequest, "input 'latents'",
                  options.seed ? "comes with a seed" : "comes with a size", "give one of them");
  }
  const Tensor batched = with_batch(given);
  FREEWHEEL_ASSIGN(Buffer latents, Buffer::create(host_memory(), DType::kFloat32, batched.shape));
  FREEWHEEL_TRY(convert(batched, latents.view()));
  job.run.latents = latents.view();
  job.buffers.push_back(std::move(latents));
  return {};
}

Status draw_latents(const Manifest& manifest, const ServedOptions& served,
                    const RequestOptions& options, const GenerationDefaults& defaults, Job& job) {
  FREEWHEEL_ASSIGN(const Shape shape, served_shape(manifest, served, options, defaults));
  FREEWHEEL_ASSIGN(Buffer latents, Buffer::create(host_memory(), DType::kFloat32, shape));
  job.seed = options.seed.value_or(defaults.seed);
  gaussian_noise(static_cast<std::uint64_t>(*job.seed), latents.view().as<float>(),
                 shape.elements());
  job.run.latents = latents.view();
  job.buffers.push_back(std::move(latents));
  return {};
}

/// Reads the seed from the input of that name or from the parameter.
Status take_seed(const Tensors& tensors, RequestOptions& options) {
  const Tensor* given = find(tensors, kSeed);
  if (given == nullptr) return {};
  const std::int64_t seed = *given->as<std::int64_t>();
  if (options.seed && *options.seed != seed) {
    return Status(Code::kRequest, "input 'seed'",
                  "is " + std::to_string(seed) + ", the parameter " + std::to_string(*options.seed),
                  "give one of them");
  }
  if (seed < 0) {
    return Status(Code::kRequest, "input 'seed'", "is " + std::to_string(seed),
                  "give a whole number from 0 on");
  }
  options.seed = seed;
  return {};
}

/// Settles what is sent, and that the decoder fits the size, before anything is computed.
Status settle_outputs(const Manifest& manifest, const RequestOptions& options,
                      const std::set<std::string>& asked, Job& job) {
  const bool has_decoder = can_decode(manifest);
  for (const std::string& name : options.outputs) {
    const bool is_known = name == kLatents || name == kProgress || (name == kFrames && has_decoder);
    if (!is_known) {
      return Status(Code::kRequest, "parameter 'outputs'", "names '" + name + "'",
                    has_decoder ? "name progress, latents or frames"
                                : "name progress or latents; frames need a bundle that was built "
                                  "with --with-vae");
    }
  }
  const auto wants = [&](const char* name) {
    return asked.count(name) != 0 && (options.outputs.empty() || options.outputs.count(name) != 0);
  };
  job.wants_latents = wants(kLatents);
  job.wants_frames = has_decoder && wants(kFrames);
  job.wants_preview = options.preview;
  if (!has_decoder || (!job.wants_frames && !job.wants_preview)) return {};
  const Status status = check_decodes(manifest, job.run.latents.shape);
  if (status.ok()) return {};
  return Status(Code::kRequest, job.wants_frames ? "output 'frames'" : "parameter 'preview'",
                status.what(),
                job.wants_frames ? "ask for its size, or give outputs=latents"
                                 : "ask for its size, or for no preview");
}

}  // namespace

Tensor without_batch(Tensor tensor) {
  Shape shape;
  for (int axis = 1; axis < tensor.shape.rank(); ++axis) shape.push_back(tensor.shape[axis]);
  tensor.shape = shape;
  return tensor;
}

Result<Job> make_job(Model& model, const ServedOptions& served, const RequestOptions& given,
                     const Tensors& tensors, const std::set<std::string>& outputs) {
  const Manifest& manifest = model.manifest();
  FREEWHEEL_TRY(check_names(manifest, tensors));
  RequestOptions options = given;
  FREEWHEEL_TRY(take_seed(tensors, options));
  FREEWHEEL_ASSIGN(ConfigEntry config, find_config(manifest, options.policy));
  FREEWHEEL_TRY(apply(manifest, options.overrides, config.cache));
  const GenerationDefaults& defaults = config.generation;
  Job job;
  job.stream = options.stream;
  job.run.cache = config.cache;
  job.run.steps = options.steps.value_or(defaults.steps);
  job.run.guidance_scale = options.guidance_scale.value_or(defaults.guidance_scale);
  job.run.flow_shift = options.flow_shift.value_or(defaults.flow_shift);
  job.run.sampler = options.sampler;
  if (const Tensor* latents = find(tensors, kLatents)) {
    FREEWHEEL_TRY(take_latents(*latents, options, job));
  } else {
    FREEWHEEL_TRY(draw_latents(manifest, served, options, defaults, job));
  }
  FREEWHEEL_TRY(settle_outputs(manifest, options, outputs, job));
  if (const Tensor* condition = find(tensors, kCondition)) {
    job.run.condition = with_batch(*condition);
  }
  std::vector<Ids> waiting;
  for (const char* branch : {"cond", "uncond"}) {
    if (branch[0] == 'u' && job.run.guidance_scale <= 1.0) continue;
    FREEWHEEL_TRY(take_prompt(manifest, branch, defaults.text_tokens, tensors, job, waiting));
  }
  // Cheap faults come before the text encoder runs.
  FREEWHEEL_TRY(check_run(model.bundle(), job.run));
  for (const Ids& prompt : waiting) {
    FREEWHEEL_ASSIGN(Buffer encoded, encode_tokens(model, prompt.ids, defaults.text_tokens));
    job.run.prompts[prompt.branch][prompt.input] = encoded.view();
    job.buffers.push_back(std::move(encoded));
  }
  return job;
}

Result<Buffer> preview_of(Model& model, const SampleEvent& event) {
  const Shape& shape = event.sample.shape;
  const bool decodes = can_decode(model.manifest());
  const std::int64_t stride = model.manifest().latent_scale.pixels;
  FREEWHEEL_ASSIGN(Buffer clean, Buffer::create(host_memory(), DType::kFloat32, shape));
  const auto sigma = static_cast<float>(event.sigma);
  const float* sample = event.sample.as<float>();
  const float* output = event.model_output.as<float>();
  std::transform(sample, sample + shape.elements(), output, clean.view().as<float>(),
                 [sigma](float x, float v) { return x - sigma * v; });
  if (!decodes) return clean;
  FREEWHEEL_ASSIGN(const Buffer decoded, decode_latents(model, clean.view()));
  const Shape& full = decoded.view().shape;
  const Shape small{full[1], full[2] / stride, full[3] / stride, full[4]};
  FREEWHEEL_ASSIGN(Buffer preview, Buffer::create(host_memory(), DType::kUint8, small));
  const auto* pixels = decoded.view().as<std::uint8_t>();
  auto* target = preview.view().as<std::uint8_t>();
  for (std::int64_t frame = 0; frame < small[0]; ++frame) {
    for (std::int64_t at = 0; at < small[1] * small[2] * small[3]; ++at) {
      const std::int64_t channel = at % small[3], column = at / small[3] % small[2];
      const std::int64_t row = at / small[3] / small[2];
      std::int64_t sum = 0;
      for (std::int64_t y = row * stride; y < (row + 1) * stride; ++y) {
        for (std::int64_t x = column * stride; x < (column + 1) * stride; ++x) {
          sum += pixels[((frame * full[2] + y) * full[3] + x) * full[4] + channel];
        }
      }
      *target++ = static_cast<std::uint8_t>((sum + stride * stride / 2) / (stride * stride));
    }
  }
  return preview;
}

}  // namespace freewheel::triton

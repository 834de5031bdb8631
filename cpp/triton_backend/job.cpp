// SPDX-License-Identifier: Apache-2.0
#include "job.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "freewheel/codec.h"
#include "try.h"

namespace freewheel::triton {
namespace {

Tensor with_batch(Tensor tensor) {
  Shape shape{1};
  for (const std::int64_t size : tensor.shape) shape.push_back(size);
  tensor.shape = shape;
  return tensor;
}

/// A prompt's input as the bundle takes it: what is the same for a batch has no such axis.
Tensor with_batch_of(const Io& declared, const Tensor& tensor) {
  const Io::Dim none = std::string();
  const Io::Dim& first = declared.shape.empty() ? none : declared.shape.front();
  return first == Io::Dim(std::string("batch")) || first == Io::Dim(std::int64_t{1})
             ? with_batch(tensor)
             : tensor;
}

const Tensor* find(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &found->second;
}

using Texts = std::map<std::string, std::string>;

/// Refuses inputs that nothing reads.
Status check_names(const Manifest& manifest, const Tensors& tensors, const Texts& texts) {
  std::vector<std::string> known = {kSeed, kLatents, kCondition};
  if (can_encode(manifest)) known.insert(known.end(), {kTokenIds, kNegativeTokenIds});
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs == "step" && name != kLatents) known.push_back(name);
    if (entry.runs != "prompt") continue;
    known.push_back(name);
    known.push_back(kNegative + name);
  }
  for (const auto& [name, text] : texts) {
    if (name != kTextInput && name != kNegativeTextInput) {
      return Status(Code::kRequest, "input '" + name + "'", "is text", "send numbers");
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      return Status(Code::kRequest, "input '" + name + "'", "is not one that this bundle takes",
                    nearest(name, known));
    }
  }
  return {};
}

/// Takes a branch's prompt: token ids, states, and what else is computed once per prompt.
void take_prompt(const Manifest& manifest, const std::string& branch, const Tensors& tensors,
                 Request& request) {
  const bool is_negative = branch == "uncond";
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs != "prompt") continue;
    const Tensor* given = find(tensors, (is_negative ? kNegative : "") + name);
    if (given != nullptr) request.prompts[branch][name] = with_batch_of(entry, *given);
  }
  const Tensor* ids = find(tensors, is_negative ? kNegativeTokenIds : kTokenIds);
  if (ids == nullptr) return;
  const auto* first = ids->as<std::int64_t>();
  request.token_ids[branch] = {first, first + ids->shape.elements()};
}

/// Takes the prompts that are text.
void take_texts(const Texts& texts, Request& request) {
  const auto prompt = texts.find(kTextInput), negative = texts.find(kNegativeTextInput);
  if (prompt != texts.end()) request.texts["cond"] = prompt->second;
  if (negative != texts.end()) request.texts["uncond"] = negative->second;
}

/// Takes the seed from the input of that name, beside the parameter.
Status take_seed(const Tensor& given, Request& request) {
  const std::int64_t seed = *given.as<std::int64_t>();
  if (request.seed && *request.seed != static_cast<std::uint64_t>(seed)) {
    return Status(Code::kRequest, "input 'seed'",
                  "is " + std::to_string(seed) + ", the parameter " + std::to_string(*request.seed),
                  "give one of them");
  }
  return request.set(kSeed, seed);
}

/// Settles what is sent.
Status settle_outputs(const Manifest& manifest, const RequestOptions& options,
                      const std::set<std::string>& asked, Job& job) {
  const bool has_decoder = can_decode(manifest);
  const std::vector<std::string> sampled = manifest.latents();
  for (const std::string& name : options.outputs) {
    const bool is_sampled = std::find(sampled.begin(), sampled.end(), name) != sampled.end();
    if (is_sampled || name == kProgress || (name == kFrames && has_decoder)) continue;
    std::string known = kProgress;
    for (const std::string& latents : sampled) known += ", " + latents;
    return Status(
        Code::kRequest, "parameter 'outputs'", "names '" + name + "'",
        "name some of " + known +
            (has_decoder ? ", frames" : "; frames need a bundle that was built with --with-vae"));
  }
  const auto wants = [&](const std::string& name) {
    return asked.count(name) != 0 && (options.outputs.empty() || options.outputs.count(name) != 0);
  };
  std::copy_if(sampled.begin(), sampled.end(), std::back_inserter(job.wanted_latents), wants);
  job.wants_frames = has_decoder && wants(kFrames);
  job.wants_preview = options.preview;
  return {};
}

}  // namespace

Tensor without_batch(Tensor tensor) {
  Shape shape;
  for (int axis = 1; axis < tensor.shape.rank(); ++axis) shape.push_back(tensor.shape[axis]);
  tensor.shape = shape;
  return tensor;
}

Result<Job> make_job(Model& model, const ServedOptions& served, const RequestOptions& given,
                     const Tensors& tensors, const Texts& texts,
                     const std::set<std::string>& outputs) {
  const Manifest& manifest = model.manifest();
  FREEWHEEL_TRY(check_names(manifest, tensors, texts));
  Job job;
  job.stream = given.stream;
  FREEWHEEL_TRY(settle_outputs(manifest, given, outputs, job));
  Request request = given.request;
  request.max_pixels = served.max_pixels;
  request.decodes = can_decode(manifest) && (job.wants_frames || job.wants_preview);
  if (const Tensor* seed = find(tensors, kSeed)) FREEWHEEL_TRY(take_seed(*seed, request));
  if (const Tensor* latents = find(tensors, kLatents)) request.latents = with_batch(*latents);
  for (const std::string& name : model.manifest().latents()) {
    const Tensor* given_noise = name == kLatents ? nullptr : find(tensors, name);
    if (given_noise != nullptr) request.beside[name].latents = with_batch(*given_noise);
  }
  if (const Tensor* condition = find(tensors, kCondition)) {
    request.condition = with_batch(*condition);
  }
  for (const char* branch : kSides) take_prompt(manifest, branch, tensors, request);
  take_texts(texts, request);
  FREEWHEEL_ASSIGN(job.prepared, prepare_run(model, request));
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

// SPDX-License-Identifier: Apache-2.0
#include "request_latents.h"

#include <algorithm>

#include "freewheel/dims.h"
#include "freewheel/sampler.h"
#include "freewheel/settings.h"
#include "limits.h"
#include "streams.h"
#include "try.h"

namespace freewheel {
namespace {

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

/// Checks the size of latents that were given, where their shape or the prompt's tells frames,
/// height and width; else by their tokens, each frame of latents for one.
Status check_given_size(const Manifest& manifest, const Request& request) {
  const Io& output = manifest.graphs.at("finish").outputs.at("model_output");
  auto sizes = match_dims("latents", output, request.latents.shape);
  if (!sizes.ok()) return {};  // `check_run` says so better
  for (const auto& [branch, states] : request.prompts) {
    for (const auto& [name, tensor] : states) {
      const auto declared = manifest.inputs.find(name);
      if (declared == manifest.inputs.end()) continue;
      const auto told = match_dims(name, declared->second, tensor.shape);
      if (told.ok()) sizes->insert(told->begin(), told->end());
    }
  }
  const auto size = [&](const char* name, std::int64_t scale) {
    const auto found = sizes->find(name);
    return found == sizes->end() ? 0 : found->second * scale;
  };
  for (const auto& [name, factors] : manifest.dims) {
    std::int64_t cells = size(name.c_str(), 1);
    bool is_area = false;
    for (const auto& [dim, divisor] : factors) {
      cells *= divisor;
      is_area = is_area || dim == "height";
    }
    const std::int64_t area = manifest.latent_scale.pixels * manifest.latent_scale.pixels;
    if (!is_area || size("height", 1) > 0 || cells <= request.max_pixels / area) continue;
    return Status(Code::kRequest, "size",
                  std::to_string(cells) + " latents are more than the " +
                      std::to_string(request.max_pixels) + " pixels that are served",
                  "ask for less, or have 'max_pixels' raised where the model is served");
  }
  const LatentScale& scale = manifest.latent_scale;
  const std::int64_t frames = size("frames", 1);
  return check_pixels(request, frames == 0 ? 0 : (frames - 1) * scale.frames + 1,
                      size("height", scale.pixels), size("width", scale.pixels));
}

/// Adds the sizes that a tensor tells to those known; they must agree.
Status add_dims(const std::string& name, const Io& declared, const Shape& shape, Dims& dims) {
  FREEWHEEL_ASSIGN(const Dims found, match_dims(name, declared, shape));
  for (const auto& [dim, size] : found) {
    const auto known = dims.emplace(dim, size).first;
    if (known->second == size) continue;
    return Status(Code::kRequest, "input '" + name + "'",
                  "has " + dim + " " + std::to_string(size) + ", others have " +
                      std::to_string(known->second),
                  "give inputs of one batch and one size");
  }
  return {};
}

/// The shape in which latents beside the first are drawn: that of their request, or what the sizes
/// of the run tell.
Result<Shape> drawn_shape(const Manifest& manifest, const std::string& name, const Beside& asked,
                          const RunRequest& run) {
  if (asked.latents.shape.rank() > 0) return asked.latents.shape;
  Dims dims;
  FREEWHEEL_ASSIGN(const Shape whole, joined_shape(run.latents, run.condition));
  FREEWHEEL_TRY(add_dims(kLatents, manifest.inputs.at(kLatents), whole, dims));
  const auto cond = run.prompts.find(kSides[0]);
  for (const auto& [input, states] : cond == run.prompts.end() ? Tensors{} : cond->second) {
    const auto declared = manifest.inputs.find(input);
    if (states.data == nullptr || declared == manifest.inputs.end()) continue;
    FREEWHEEL_TRY(add_dims(input, declared->second, states.shape, dims));
  }
  FREEWHEEL_ASSIGN(dims, derive_dims(manifest, dims));
  const Io& declared = manifest.inputs.at(name);
  auto shape = shape_of(name, declared, dims);
  if (shape.ok()) return shape;
  return Status(Code::kRequest, "input '" + name + "'",
                "is missing, and neither the prompt nor 'latents' tells its shape",
                "give host float32 " + declared.text());
}

/// Copies latents that were given: a run overwrites its own.
Result<Tensor> copied(const Tensor& given, PreparedRun& prepared) {
  FREEWHEEL_ASSIGN(Buffer latents, Buffer::create(host_memory(), DType::kFloat32, given.shape));
  FREEWHEEL_TRY(convert(given, latents.view()));
  prepared.buffers.push_back(std::move(latents));
  return prepared.buffers.back().view();
}

Result<Tensor> drawn(const Shape& shape, Noise& noise, PreparedRun& prepared) {
  FREEWHEEL_ASSIGN(Buffer latents, Buffer::create(host_memory(), DType::kFloat32, shape));
  noise.fill(latents.view().as<float>(), shape.elements());
  prepared.buffers.push_back(std::move(latents));
  return prepared.buffers.back().view();
}

/// Gives the run its first latents: those of the request, or noise.
Status settle_first(const Manifest& manifest, const Request& request, Noise& noise,
                    PreparedRun& prepared) {
  Shape shape = request.latents.shape;
  if (request.latents.data == nullptr && shape.rank() == 0) {
    FREEWHEEL_ASSIGN(shape, requested_shape(manifest, request));
  }
  FREEWHEEL_ASSIGN(std::string warning,
                   check_geometry(manifest, request.cache, shape, request.force));
  if (!warning.empty()) prepared.run.warnings.push_back(std::move(warning));
  if (request.latents.data == nullptr) {
    FREEWHEEL_ASSIGN(prepared.run.latents, drawn(shape, noise, prepared));
    return {};
  }
  const bool has_size = request.frames || request.height || request.width;
  if (request.seed || has_size) {
    return Status(Code::kRequest, "input 'latents'",
                  request.seed ? "comes with a seed" : "comes with a size", "give one of them");
  }
  FREEWHEEL_TRY(check_given_size(manifest, request));
  FREEWHEEL_ASSIGN(prepared.run.latents, copied(request.latents, prepared));
  return {};
}

/// Refuses what is asked of latents that the model does not sample beside the first.
Status check_names(const Manifest& manifest, const std::map<std::string, Beside>& asked) {
  std::vector<std::string> sampled = manifest.latents();
  for (const auto& [name, one] : asked) {
    if (name != kLatents && std::find(sampled.begin(), sampled.end(), name) != sampled.end()) {
      continue;
    }
    return Status(Code::kRequest, "input '" + name + "'",
                  "is not sampled beside 'latents' by this bundle", nearest(name, sampled));
  }
  return {};
}

}  // namespace

Status check_finite(const Tensor& tensor, const std::string& where, const char* hint) {
  if (tensor.data == nullptr || is_finite(tensor)) return {};
  return Status(Code::kRequest, where, "holds values that are not finite", hint);
}

Result<Shape> joined_shape(const Tensor& latents, const Tensor& condition) {
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

Status check_latents(const Manifest& manifest, const RunRequest& request) {
  FREEWHEEL_TRY(check_names(manifest, request.beside));
  std::map<std::string, Tensor> sampled;
  Dims dims;
  for (const std::string& name : manifest.latents()) {
    const auto other = request.beside.find(name);
    const bool is_first = name == kLatents;
    Tensor& latents = sampled[name];
    if (is_first) latents = request.latents;
    if (other != request.beside.end()) latents = other->second.latents;
    const InputEntry& declared = manifest.inputs.at(name);
    if (latents.data == nullptr || latents.dtype != DType::kFloat32 || latents.shape.rank() < 2) {
      return Status(Code::kRequest, "input '" + name + "'", "is no float32 tensor",
                    "give host float32 " + declared.text());
    }
    FREEWHEEL_ASSIGN(const Shape whole,
                     joined_shape(latents, is_first ? request.condition : Tensor{}));
    FREEWHEEL_TRY(add_dims(name, declared, whole, dims));
    FREEWHEEL_TRY(check_finite(latents, "input '" + name + "'", "give standard normal noise"));
  }
  FREEWHEEL_ASSIGN(dims, derive_dims(manifest, dims));
  for (const auto& [name, latents] : sampled) {
    const std::string output = beside(name, kLatents, kModelOutput);
    const Io& declared = manifest.graphs.at("finish").outputs.at(output);
    FREEWHEEL_ASSIGN(const Shape given, shape_of(output, declared, dims));
    if (given == latents.shape) continue;
    return Status(Code::kRequest, "input '" + name + "'",
                  "has shape " + latents.shape.text() + ", the model gives " + given.text(),
                  "give noise of the output's channels, and the rest as 'condition'");
  }
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

Status settle_latents(const Manifest& manifest, const Request& request,
                      const GenerationDefaults& defaults, PreparedRun& prepared) {
  FREEWHEEL_TRY(check_names(manifest, request.beside));
  const auto seed = request.seed.value_or(static_cast<std::uint64_t>(defaults.seed));
  const bool is_drawn = request.latents.data == nullptr;
  if (is_drawn && seed > static_cast<std::uint64_t>(kMaxSeed)) {
    return Status(Code::kRequest, "seed", "is " + std::to_string(seed),
                  "give a whole number from 0 to " + std::to_string(kMaxSeed));
  }
  if (is_drawn) prepared.seed = seed;
  Noise noise(seed);
  FREEWHEEL_TRY(settle_first(manifest, request, noise, prepared));
  for (const std::string& name : manifest.latents()) {
    if (name == kLatents) continue;
    const auto found = request.beside.find(name);
    const Beside asked = found == request.beside.end() ? Beside{} : found->second;
    Tensor& latents = prepared.run.beside[name].latents;
    if (asked.latents.data != nullptr) {
      FREEWHEEL_ASSIGN(latents, copied(asked.latents, prepared));
      continue;
    }
    if (!is_drawn) {
      return Status(Code::kRequest, "input '" + name + "'", "is missing beside 'latents'",
                    "give both, or neither: noise of a seed is drawn for all");
    }
    FREEWHEEL_ASSIGN(const Shape shape, drawn_shape(manifest, name, asked, prepared.run));
    FREEWHEEL_ASSIGN(latents, drawn(shape, noise, prepared));
  }
  return {};
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/dims.h"

#include <algorithm>

#include "limits.h"
#include "try.h"

namespace freewheel {

Result<Dims> match_dims(const std::string& name, const Io& io, const Shape& shape) {
  Dims sizes;
  bool fits = shape.rank() == static_cast<int>(io.shape.size());
  for (int axis = 0; fits && axis < shape.rank(); ++axis) {
    const Io::Dim& dim = io.shape[static_cast<std::size_t>(axis)];
    if (const std::string* key = std::get_if<std::string>(&dim)) {
      fits = sizes.emplace(*key, shape[axis]).first->second == shape[axis];
    } else {
      fits = std::get<std::int64_t>(dim) == shape[axis];
    }
    fits = fits && shape[axis] > 0;
  }
  if (!fits) {
    return Status(Code::kRequest, "input '" + name + "'",
                  "has shape " + shape.text() + ", the bundle takes " + io.text(),
                  "give latents and embeddings of the model that the bundle was built from");
  }
  return sizes;
}

Result<Dims> derive_dims(const Manifest& manifest, const Dims& sizes) {
  Dims dims = sizes;
  for (const auto& [name, factors] : manifest.dims) {
    std::int64_t product = 1;
    bool is_known = true;
    for (const auto& [dim, divisor] : factors) {
      const auto found = dims.find(dim);
      is_known = is_known && found != dims.end();  // else an input still to come tells it
      if (!is_known) break;
      if (found->second % divisor != 0) {
        return Status(Code::kRequest, "dimension '" + dim + "'",
                      "is " + std::to_string(found->second) + ", which " + std::to_string(divisor) +
                          " does not divide",
                      "choose a size that the model's patches divide");
      }
      const std::int64_t factor = found->second / divisor;
      if (factor != 0 && product > kMaxSize / factor) {
        return Status(Code::kRequest, "dimension '" + name + "'", "is absurdly large",
                      "choose a smaller size");
      }
      product *= factor;
    }
    if (!is_known) continue;
    if (const auto known = dims.emplace(name, product).first; known->second != product) {
      return Status(Code::kRequest, "dimension '" + name + "'",
                    "is " + std::to_string(known->second) + ", but what it derives from gives " +
                        std::to_string(product),
                    "give sizes that belong to the latents");
    }
  }
  for (const auto& [name, terms] : manifest.sums) {
    std::int64_t sum = 0;
    bool is_known = !terms.empty();
    for (const SumTerm& term : terms) {
      if (term.dim.empty()) {
        sum += term.number;
        continue;
      }
      const auto found = dims.find(term.dim);
      is_known = is_known && found != dims.end();
      if (!is_known) break;
      const std::int64_t multiples = (found->second + term.number - 1) / term.number;
      sum += std::min(multiples, kMaxSize / term.number) * term.number;
      sum = std::min(sum, kMaxSize);
    }
    if (!is_known) continue;
    if (sum < 1) {
      return Status(Code::kRequest, "dimension '" + name + "'",
                    "is " + std::to_string(sum) + ", and follows from the sizes of the run",
                    "choose larger ones, such as more frames");
    }
    if (const auto known = dims.emplace(name, sum).first; known->second != sum) {
      return Status(Code::kRequest, "dimension '" + name + "'",
                    "is " + std::to_string(known->second) + ", but what it is a sum of gives " +
                        std::to_string(sum),
                    "give sizes that belong to the latents");
    }
  }
  for (const auto& [name, limit] : manifest.limits) {
    const auto found = dims.find(name);
    if (found == dims.end() || found->second <= limit.most) continue;
    return Status(Code::kRequest, "dimension '" + name + "'",
                  "is " + std::to_string(found->second) + ", the model has positions for " +
                      std::to_string(limit.most) + ": " + limit.where,
                  "choose a smaller size");
  }
  return dims;
}

Result<Shape> shape_of(const std::string& name, const Io& io, const Dims& dims) {
  Shape shape;
  std::int64_t elements = 1;
  for (const Io::Dim& dim : io.shape) {
    std::int64_t size = 0;
    if (const std::string* key = std::get_if<std::string>(&dim)) {
      const auto found = dims.find(*key);
      if (found == dims.end()) {
        return Status(Code::kBundle, "tensor '" + name + "'",
                      "has a dimension '" + *key + "' whose size nothing tells",
                      "build the bundle again");
      }
      size = found->second;
    } else {
      size = std::get<std::int64_t>(dim);
    }
    if (size != 0 && elements > kMaxSize / size) {
      return Status(Code::kRequest, "tensor '" + name + "'", "is absurdly large",
                    "choose a smaller size");
    }
    elements *= size;
    shape.push_back(size);
  }
  return shape;
}

namespace {

/// The latents along a size that the model takes as one patch.
std::int64_t patch_of(const Manifest& manifest, const std::string& name) {
  std::int64_t patch = 1;
  for (const auto& [dim, factors] : manifest.dims) {
    for (const auto& [factor, divisor] : factors) {
      if (factor == name && divisor <= kMaxLatentScale) patch = std::max(patch, divisor);
    }
  }
  return patch;
}

}  // namespace

Result<Shape> latent_shape(const Manifest& manifest, std::int64_t frames, std::int64_t height,
                           std::int64_t width) {
  const LatentScale& scale = manifest.latent_scale;
  const std::string most = std::to_string(kMaxVideoSide);
  const std::int64_t patch = patch_of(manifest, "frames");
  const std::int64_t step = scale.frames * patch;
  const std::int64_t first = step - scale.frames + 1;  // the first latent is one frame
  if (frames < first || frames > kMaxVideoSide || (frames - first) % step != 0) {
    const std::int64_t more = first % step, half = step / 2;
    const std::int64_t within = std::clamp(frames, first, std::max(first, kMaxVideoSide - half));
    const std::string multiple =
        (more == 0 ? "" : std::to_string(more) + " more than ") + "a multiple of " +
        std::to_string(step) +
        (patch == 1 ? "" : ": " + std::to_string(patch) + " latent frames are a patch");
    return Status(Code::kRequest, "frames",
                  "are " + std::to_string(frames) + ", expected " +
                      (frames > kMaxVideoSide ? most + " at most" : multiple),
                  "ask for " + std::to_string((within - first + half) / step * step + first));
  }
  const std::pair<const char*, std::int64_t> sides[] = {{"height", height}, {"width", width}};
  for (const auto& [name, pixels] : sides) {
    const std::int64_t multiple = scale.pixels * patch_of(manifest, name);
    if (pixels < multiple || pixels > kMaxVideoSide || pixels % multiple != 0) {
      const std::int64_t within = std::min(pixels, kMaxVideoSide) / multiple * multiple;
      return Status(
          Code::kRequest, name,
          "is " + std::to_string(pixels) + ", expected " +
              (pixels > kMaxVideoSide ? most + " pixels at most"
                                      : "a multiple of " + std::to_string(multiple) + " pixels"),
          "ask for " + std::to_string(std::max(within, multiple)));
    }
  }
  FREEWHEEL_ASSIGN(const Dims dims,
                   derive_dims(manifest, {{"batch", 1},
                                          {"frames", (frames - 1) / scale.frames + 1},
                                          {"height", height / scale.pixels},
                                          {"width", width / scale.pixels}}));
  return shape_of("latents", manifest.graphs.at("finish").outputs.at("model_output"), dims);
}

Result<std::string> check_geometry(const Manifest& manifest, const std::string& config,
                                   const Shape& latents, bool force) {
  const auto found = manifest.configs.find(config);
  if (found == manifest.configs.end()) return std::string();
  const GenerationDefaults& made = found->second.generation;
  const GenerationDefaults& own = manifest.configs.at(manifest.default_config).generation;
  if (made.width == own.width && made.height == own.height && made.frames == own.frames) {
    return std::string();
  }
  const auto text = [](const GenerationDefaults& size) {
    return std::to_string(size.width) + "x" + std::to_string(size.height) + ", " +
           std::to_string(size.frames) + " frames";
  };
  FREEWHEEL_ASSIGN(const Shape usual, latent_shape(manifest, own.frames, own.height, own.width));
  const std::int64_t times = latents.elements() / std::max<std::int64_t>(1, usual.elements());
  const std::string what = "was made for " + text(made) + ", and the bundle's own size is " +
                           text(own) + ": this run has " + std::to_string(times) +
                           " times its latents";
  if (times >= kFarBeyond && !force) {
    return Status(Code::kRequest, "config '" + config + "'", what,
                  "run at the bundle's size: height " + std::to_string(own.height) + ", width " +
                      std::to_string(own.width) + ", frames " + std::to_string(own.frames) +
                      "; or run it with 'force'");
  }
  return "config '" + config + "' " + what;
}

}  // namespace freewheel

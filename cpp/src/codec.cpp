// SPDX-License-Identifier: Apache-2.0
#include "freewheel/codec.h"

#include <algorithm>
#include <cmath>

#include "body.h"
#include "freewheel/dims.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kEncoder[] = "text_encoder";
constexpr char kDecoder[] = "vae_decode";

/// Runs one graph over host tensors of the declared names; returns its only output.
Result<Buffer> run_once(Model& model, const std::string& graph_name, const Tensors& inputs) {
  const GraphEntry& graph = model.manifest().graphs.at(graph_name);
  Memory& memory = model.memory();
  BufferSet buffers;
  Tensors values;
  Dims dims;
  for (const auto& [name, io] : graph.inputs) {
    const auto given = inputs.find(name);
    if (given == inputs.end() || given->second.dtype != io.dtype) {
      return Status(Code::kBundle, "graph '" + graph_name + "', input '" + name + "'",
                    "is not one that this version knows", "build the bundle again");
    }
    FREEWHEEL_ASSIGN(const Dims found, match_dims(name, io, given->second.shape));
    dims.insert(found.begin(), found.end());
    FREEWHEEL_TRY(buffers.allocate(memory, name, io, dims, values));
    FREEWHEEL_TRY(memory.upload(values.at(name).data, given->second.data, given->second.bytes()));
  }
  FREEWHEEL_TRY(buffers.allocate(memory, graph.outputs, dims, values));
  FREEWHEEL_ASSIGN(const std::unique_ptr<BoundCall> call, model.bind(graph_name, values));
  FREEWHEEL_TRY(call->run());
  const Tensor output = values.at(graph.outputs.begin()->first);
  FREEWHEEL_ASSIGN(Buffer result, Buffer::create(host_memory(), output.dtype, output.shape));
  FREEWHEEL_TRY(memory.download(result.view().data, output.data, output.bytes()));
  FREEWHEEL_TRY(memory.synchronize());
  return result;
}

Status lacks(const char* what, const char* flag) {
  return Status(Code::kRequest, "bundle", std::string("was built without its ") + what,
                std::string("build it with ") + flag);
}

}  // namespace

bool can_encode(const Manifest& manifest) noexcept { return manifest.graphs.count(kEncoder) != 0; }
bool can_tokenize(const Manifest& manifest) noexcept { return manifest.tokenizer.has_value(); }
bool can_decode(const Manifest& manifest) noexcept { return manifest.graphs.count(kDecoder) != 0; }

std::string text_input(const Manifest& manifest) {
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs == "prompt" && is_text(name)) return name;
  }
  return "text_states";
}

bool is_text(const std::string& input) noexcept { return input.find("text") != std::string::npos; }

Status check_token_ids(const Manifest& manifest, const std::vector<std::int64_t>& ids,
                       std::int64_t text_tokens) {
  if (!can_encode(manifest)) return lacks("text encoder", "--with-text-encoder");
  const auto count = static_cast<std::int64_t>(ids.size());
  if (ids.empty() || count > text_tokens || text_tokens > (1 << 20)) {
    return Status(Code::kRequest, "token ids",
                  "are " + std::to_string(count) + ", expected 1 to " + std::to_string(text_tokens),
                  "shorten the prompt, or raise the text length");
  }
  const std::int64_t known = manifest.vocabulary_size.value_or(0);
  const auto stray = std::find_if(ids.begin(), ids.end(),
                                  [known](std::int64_t id) { return id < 0 || id >= known; });
  if (stray == ids.end()) return {};
  return Status(Code::kRequest, "token ids",
                "hold " + std::to_string(*stray) + ", expected 0 to " + std::to_string(known - 1),
                "take them from the pipeline's own tokenizer");
}

Status check_decodes(const Manifest& manifest, const Shape& latents) {
  if (!can_decode(manifest)) return lacks("VAE decoder", "--with-vae");
  const auto& inputs = manifest.graphs.at(kDecoder).inputs;
  const auto takes = inputs.find("latents");
  if (takes != inputs.end() && match_dims("latents", takes->second, latents).ok()) return {};
  return Status(Code::kRequest, "VAE decoder",
                "latents are " + latents.text() + ", it was compiled for " +
                    (takes == inputs.end() ? "none" : takes->second.text()),
                "ask for the size that the bundle was built for, or for latents alone");
}

Result<Shape> text_shape(const Manifest& manifest, std::int64_t text_tokens) {
  if (!can_encode(manifest)) return lacks("text encoder", "--with-text-encoder");
  const Io& states = manifest.graphs.at(kEncoder).outputs.begin()->second;
  return shape_of("text_states", states, {{"batch", 1}, {"text_tokens", text_tokens}});
}

Result<Shape> frames_shape(const Manifest& manifest, const Shape& latents) {
  FREEWHEEL_TRY(check_decodes(manifest, latents));
  const Io& frames = manifest.graphs.at(kDecoder).outputs.begin()->second;
  return shape_of("frames", frames, {});
}

Result<Buffer> encode_tokens(Model& model, const std::vector<std::int64_t>& ids,
                             std::int64_t text_tokens) {
  FREEWHEEL_TRY(check_token_ids(model.manifest(), ids, text_tokens));
  const auto count = static_cast<std::int64_t>(ids.size());
  const Shape shape{1, text_tokens};
  FREEWHEEL_ASSIGN(const Buffer padded, Buffer::create(host_memory(), DType::kInt64, shape));
  FREEWHEEL_ASSIGN(const Buffer mask, Buffer::create(host_memory(), DType::kInt64, shape));
  std::copy(ids.begin(), ids.end(), padded.view().as<std::int64_t>());
  std::fill_n(mask.view().as<std::int64_t>(), count, 1);
  return run_once(model, kEncoder, {{"input_ids", padded.view()}, {"attention_mask", mask.view()}});
}

Result<Buffer> decode_latents(Model& model, const Tensor& latents) {
  FREEWHEEL_TRY(check_decodes(model.manifest(), latents.shape));
  FREEWHEEL_ASSIGN(const Buffer frames, run_once(model, kDecoder, {{"latents", latents}}));
  const Tensor& values = frames.view();
  if (values.dtype != DType::kFloat32 || values.shape.rank() != 5 || values.shape[4] != 3) {
    return Status(Code::kBundle, std::string("graph '") + kDecoder + "'",
                  "does not output float32 frames [batch, frames, height, width, 3]",
                  "build the bundle again");
  }
  FREEWHEEL_ASSIGN(Buffer pixels, Buffer::create(host_memory(), DType::kUint8, values.shape));
  std::transform(values.as<float>(), values.as<float>() + values.shape.elements(),
                 pixels.view().as<std::uint8_t>(), [](float value) {
                   const float clamped = value > 0.0f ? std::min(value, 1.0f) : 0.0f;
                   return static_cast<std::uint8_t>(std::nearbyint(clamped * 255.0f));
                 });
  return pixels;
}

}  // namespace freewheel

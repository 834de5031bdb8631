// SPDX-License-Identifier: Apache-2.0
/// The smallest program around libfreewheel: one prompt through the demo bundle, step by step, at
/// the size, shift and seed that the bundle's default config names.

#include <cstdio>
#include <vector>

#include "freewheel/sampler.h"
#include "freewheel/session.h"
#include "freewheel/settings.h"

int main(int argc, char** argv) {
  namespace fw = freewheel;
  auto model = fw::Model::load(argc > 1 ? argv[1] : "bundle");
  if (!model.ok()) return std::fprintf(stderr, "%s\n", model.status().message().c_str()), 1;
  auto session = fw::Session::create(*model);
  if (!session.ok()) return std::fprintf(stderr, "%s\n", session.status().message().c_str()), 1;

  const fw::Manifest& manifest = (*model)->manifest();
  const fw::GenerationDefaults run = fw::find_config(manifest, "").value().generation;
  const auto shape = fw::latent_shape(manifest, run.frames, run.height, run.width);
  if (!shape.ok()) return std::fprintf(stderr, "%s\n", shape.status().message().c_str()), 1;
  std::vector<float> latents(static_cast<std::size_t>(shape->elements())), text(16 * 128, 0.1f);
  fw::gaussian_noise(static_cast<std::uint64_t>(run.seed), latents.data(), shape->elements());

  fw::RunRequest request;
  request.latents = {latents.data(), fw::DType::kFloat32, *shape};
  request.prompts["cond"]["text_states"] = {text.data(), fw::DType::kFloat32, {1, 16, 128}};
  request.steps = 10;
  request.flow_shift = run.flow_shift;
  request.cache.policy = "taylorseer";
  request.cache.parameters["interval"] = std::int64_t{2};
  request.on_branch_step = [](const fw::BranchEvent& event) {
    std::printf("step %lld %s\n", static_cast<long long>(event.step_index),
                event.computed ? "computed" : "reused");
  };
  const fw::Status status = (*session)->run(request);
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
  std::printf("%s\n", (*session)->statistics().json().c_str());
  return 0;
}

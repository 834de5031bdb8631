// SPDX-License-Identifier: Apache-2.0
/// The smallest program around libfreewheel: one prompt through the demo bundle, step by step.

#include <cstdio>
#include <vector>

#include "freewheel/sampler.h"
#include "freewheel/session.h"

int main(int argc, char** argv) {
  namespace fw = freewheel;
  auto model = fw::Model::load(argc > 1 ? argv[1] : "bundle");
  if (!model.ok()) return std::fprintf(stderr, "%s\n", model.status().message().c_str()), 1;
  auto session = fw::Session::create(*model);
  if (!session.ok()) return std::fprintf(stderr, "%s\n", session.status().message().c_str()), 1;

  std::vector<float> latents(16 * 5 * 12 * 12), text(16 * 128, 0.1f);
  fw::gaussian_noise(42, latents.data(), static_cast<std::int64_t>(latents.size()));

  fw::RunRequest request;
  request.latents = {latents.data(), fw::DType::kFloat32, {1, 16, 5, 12, 12}};
  request.prompts["cond"]["text_states"] = {text.data(), fw::DType::kFloat32, {1, 16, 128}};
  request.steps = 10;
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

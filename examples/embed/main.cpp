// SPDX-License-Identifier: Apache-2.0
/// The smallest program around libfreewheel: one prompt through the demo bundle, step by step, at
/// the size, shift and seed that the bundle's default config names.

#include <cstdio>
#include <vector>

#include "freewheel/session.h"

int main(int argc, char** argv) {
  namespace fw = freewheel;
  auto model = fw::Model::load(argc > 1 ? argv[1] : "bundle");
  if (!model.ok()) return std::fprintf(stderr, "%s\n", model.status().message().c_str()), 1;
  auto session = fw::Session::create(*model);
  if (!session.ok()) return std::fprintf(stderr, "%s\n", session.status().message().c_str()), 1;

  std::vector<float> text(16 * 128, 0.1f);
  fw::Request request;
  request.cache = "taylorseer";
  request.overrides = {{"interval", std::int64_t{2}}};
  request.steps = 10;
  request.guidance_scale = 1.0;
  request.prompts["cond"]["text_states"] = {text.data(), fw::DType::kFloat32, {1, 16, 128}};
  auto prepared = fw::prepare_run(**model, request);
  if (!prepared.ok()) return std::fprintf(stderr, "%s\n", prepared.status().message().c_str()), 1;

  prepared->run.on_branch_step = [](const fw::BranchEvent& event) {
    std::printf("step %lld %s\n", static_cast<long long>(event.step_index),
                event.computed ? "computed" : "reused");
  };
  const fw::Status status = (*session)->run(prepared->run);
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
  std::printf("%s\n", (*session)->statistics().json().c_str());
  return 0;
}

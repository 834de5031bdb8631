// SPDX-License-Identifier: Apache-2.0
/// Runs any bundle through the C ABI, from safetensors files to one.
///
///   abi_run BUNDLE THREADS PROMPTS LATENTS OUT CACHE STEPS GUIDANCE [NAME=SCALE ...]
///
/// PROMPTS has float32 tensors named `<branch>.<input>`, LATENTS noise by name; SCALE is the
/// guidance scale of latents beside the first.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "freewheel/files.h"
#include "freewheel/freewheel.h"

int main(int argc, char** argv) {
  using freewheel::Tensor;
  if (argc < 9) return 2;
  auto prompts = freewheel::SafetensorsFile::open(argv[3]);
  auto latents = freewheel::SafetensorsFile::open(argv[4]);
  if (!prompts.ok() || !latents.ok()) return 2;

  std::map<std::string, std::pair<std::string, std::string>> names;
  std::vector<freewheel_prompt> given;
  for (const auto& [name, tensor] : prompts->tensors) {
    const std::size_t dot = name.find('.');
    const auto& [branch, input] = names[name] = {name.substr(0, dot), name.substr(dot + 1)};
    given.push_back({branch.c_str(), input.c_str(), tensor.as<float>(), tensor.shape.begin(),
                     tensor.shape.rank()});
  }
  std::map<std::string, std::vector<float>> samples;
  std::vector<freewheel_beside> beside;
  freewheel_run_options run = {};
  run.struct_size = sizeof run;
  for (auto& [name, tensor] : latents->tensors) {
    const float* noise = tensor.as<float>();
    std::vector<float>& sample = samples[name];
    sample.assign(noise, noise + tensor.shape.elements());
    if (name == "latents") {
      run.latents = sample.data();
      run.latents_shape = tensor.shape.begin();
      run.latents_rank = tensor.shape.rank();
      continue;
    }
    freewheel_beside one = {name.c_str(), sample.data(), tensor.shape.begin(), tensor.shape.rank(),
                            0.0};
    for (int i = 9; i < argc; ++i) {
      const std::string scale = argv[i];
      if (scale.rfind(name + "=", 0) == 0) {
        one.guidance_scale = std::atof(scale.c_str() + name.size() + 1);
      }
    }
    beside.push_back(one);
  }
  run.prompts = given.data();
  run.prompt_count = static_cast<int32_t>(given.size());
  run.beside = beside.data();
  run.beside_count = static_cast<int32_t>(beside.size());
  run.cache = argv[6];
  run.steps = std::atoll(argv[7]);
  run.guidance_scale = std::atof(argv[8]);

  freewheel_model_options options = {};
  options.struct_size = sizeof options;
  options.threads = std::atoi(argv[2]);
  freewheel_model* model = nullptr;
  freewheel_session* session = nullptr;
  int code = 1;
  if (freewheel_model_create(argv[1], &options, &model) != FREEWHEEL_OK ||
      freewheel_session_create(model, &session) != FREEWHEEL_OK) {
    std::fprintf(stderr, "%s\n", freewheel_model_last_error(model));
  } else if (freewheel_session_run(session, &run) != FREEWHEEL_OK) {
    std::fprintf(stderr, "%s\n", freewheel_session_last_error(session));
  } else {
    freewheel::Tensors results;
    for (auto& [name, sample] : samples) {
      results[name] = {sample.data(), freewheel::DType::kFloat32, latents->tensors[name].shape};
    }
    code = freewheel::write_safetensors(argv[5], results).ok() ? 0 : 1;
  }
  freewheel_session_destroy(session);
  freewheel_model_destroy(model);
  return code;
}

// SPDX-License-Identifier: Apache-2.0
#include "served_model.h"

#include "error.h"
#include "try.h"

namespace freewheel::triton {
namespace {

Result<std::string> config_json(TRITONBACKEND_Model* model) {
  TRITONSERVER_Message* message = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelConfig, model, 1, &message);
  const char* text = nullptr;
  std::size_t bytes = 0;
  Status status = status_from_error(TRITONSERVER_MessageSerializeToJson(message, &text, &bytes),
                                    "MessageSerializeToJson");
  std::string json = status.ok() ? std::string(text, bytes) : std::string();
  (void)status_from_error(TRITONSERVER_MessageDelete(message), "MessageDelete");
  if (!status.ok()) return status;
  return json;
}

}  // namespace

Result<std::unique_ptr<ServedModel>> ServedModel::load(TRITONBACKEND_Model* handle) {
  auto served = std::make_unique<ServedModel>();
  const char* text = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelName, handle, &text);
  served->name = text;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelVersion, handle, &served->version);
  TRITONBACKEND_ArtifactType type = TRITONBACKEND_ARTIFACT_FILESYSTEM;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelRepository, handle, &type, &text);
  const std::string folder = std::string(text) + "/" + std::to_string(served->version) + "/bundle";
  TRITONBACKEND_Backend* backend = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelBackend, handle, &backend);
  void* state = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_BackendState, backend, &state);
  served->metrics = static_cast<Metrics*>(state);
  FREEWHEEL_ASSIGN(const std::string config, config_json(handle));
  FREEWHEEL_ASSIGN(served->options, ServedOptions::parse(config, "model '" + served->name + "'"));
  ModelOptions options;
  options.backend = served->options.backend;
  options.backend_options.threads = static_cast<int>(served->options.threads);
  options.backend_options.streams = static_cast<int>(served->options.instances);
  options.backend_options.device = static_cast<int>(served->options.device);
  options.backend_options.cuda_graphs = served->options.cuda_graphs;
  options.offload = served->options.offload;
  options.allow_compile = served->options.allow_compile;
  options.lora_folder = served->options.lora_folder;
  FREEWHEEL_ASSIGN(served->model, Model::load(folder, options));
  FREEWHEEL_TRY(served->model->load_all());
  return served;
}

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// How a model of the repository is served: the `parameters` of its config.pbtxt.

#include <cstdint>
#include <string>

#include "freewheel/status.h"

namespace freewheel::triton {

struct ServedOptions {
  std::string backend;         ///< Empty takes the first that the bundle and the library have.
  std::int64_t threads = 0;    ///< CPU threads of one engine call; 0 takes every core.
  std::int64_t device = 0;     ///< Index of the GPU.
  std::int64_t instances = 1;  ///< Of all instance groups: runs at the same time.
  bool cuda_graphs = false;    ///< Replay each engine call as one CUDA graph.
  bool offload = false;        ///< Keep the blocks' weights in host memory.
  std::string lora_folder;     ///< The only one that requests may name LoRAs of; empty takes none.
  bool allow_compile = false;  ///< Whether engines that don't fit this machine are compiled anew.
  /// Frames · height · width that a request may ask for: memory grows with it.
  std::int64_t max_pixels = 81LL * 720 * 1280;

  /// Reads them from a model's config as the server gives it in JSON. Unknown names are faults.
  /// @param where The model, for messages.
  static Result<ServedOptions> parse(const std::string& config_json, const std::string& where);
};

}  // namespace freewheel::triton

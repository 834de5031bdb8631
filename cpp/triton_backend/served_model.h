// SPDX-License-Identifier: Apache-2.0
#pragma once

/// One version of a model of the repository: engines and weights, shared by its instances.

#include <cstdint>
#include <memory>
#include <string>

#include "freewheel/model.h"
#include "metrics.h"
#include "served_options.h"
#include "triton_api.h"

namespace freewheel::triton {

struct ServedModel {
  std::string name;
  std::uint64_t version = 0;
  ServedOptions options;
  std::shared_ptr<Model> model;
  Metrics* metrics = nullptr;  ///< The backend's, which outlives its models.

  /// Loads `<repository>/<version>/bundle` with every engine and weight, so that a bundle that
  /// can't be served fails here and not in a request.
  static Result<std::unique_ptr<ServedModel>> load(TRITONBACKEND_Model* model);
};

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What the table of backends is made of; each function lives in its backend's one file.

#include "freewheel/engine.h"

namespace freewheel {

Result<std::shared_ptr<Backend>> create_openvino(const BackendOptions& options);
Result<std::shared_ptr<Backend>> create_tensorrt(const BackendOptions& options);

}  // namespace freewheel

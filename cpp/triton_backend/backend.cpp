// SPDX-License-Identifier: Apache-2.0
/// What the server calls: makes and ends the backend's, the models' and the instances' state.

#include <exception>

#include "error.h"
#include "instance.h"
#include "metrics.h"
#include "served_model.h"
#include "triton_api.h"
#include "try.h"

namespace {

using freewheel::Code;
using freewheel::Status;
using freewheel::triton::error_from_status;
using freewheel::triton::Instance;
using freewheel::triton::Metrics;
using freewheel::triton::ServedModel;

constexpr std::uint32_t kApiMajor = 1, kApiMinor = 19;

/// Lets no exception into the server.
template <typename Body>
TRITONSERVER_Error* guarded(Body body) noexcept {
  try {
    return error_from_status(body());
  } catch (const std::exception& fault) {
    return error_from_status(Status(Code::kInternal, "freewheel", fault.what(), "report this"));
  }
}

}  // namespace

TRITONSERVER_Error* TRITONBACKEND_Initialize(TRITONBACKEND_Backend* backend) {
  return guarded([&]() -> Status {
    std::uint32_t major = 0, minor = 0;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ApiVersion, &major, &minor);
    if (major != kApiMajor || minor < kApiMinor) {
      return Status(Code::kBackend, "backend 'freewheel'",
                    "the server has backend API " + std::to_string(major) + "." +
                        std::to_string(minor) + ", this library was written for " +
                        std::to_string(kApiMajor) + "." + std::to_string(kApiMinor),
                    "use Triton Inference Server 2.43 or later");
    }
    auto metrics = Metrics::create();
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_BackendSetState, backend, metrics.get());
    (void)metrics.release();
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_Finalize(TRITONBACKEND_Backend* backend) {
  return guarded([&]() -> Status {
    void* state = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_BackendState, backend, &state);
    delete static_cast<Metrics*>(state);
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model) {
  return guarded([&]() -> Status {
    FREEWHEEL_ASSIGN(auto served, ServedModel::load(model));
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelSetState, model, served.get());
    (void)served.release();
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model) {
  return guarded([&]() -> Status {
    void* state = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelState, model, &state);
    delete static_cast<ServedModel*>(state);
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance) {
  return guarded([&]() -> Status {
    TRITONBACKEND_Model* model = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelInstanceModel, instance, &model);
    void* served = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelState, model, &served);
    FREEWHEEL_ASSIGN(auto made, Instance::create(instance, *static_cast<ServedModel*>(served)));
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelInstanceSetState, instance, made.get());
    (void)made.release();
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* instance) {
  return guarded([&]() -> Status {
    void* state = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelInstanceState, instance, &state);
    delete static_cast<Instance*>(state);
    return {};
  });
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(TRITONBACKEND_ModelInstance* instance,
                                                       TRITONBACKEND_Request** requests,
                                                       std::uint32_t count) {
  return guarded([&]() -> Status {
    void* state = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_ModelInstanceState, instance, &state);
    for (std::uint32_t index = 0; index < count; ++index) {
      static_cast<Instance*>(state)->execute(requests[index]);
    }
    return {};
  });
}

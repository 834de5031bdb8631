// SPDX-License-Identifier: Apache-2.0
#include "responder.h"

#include <cstring>
#include <vector>

#include "error.h"
#include "job.h"
#include "try.h"

namespace freewheel::triton {
namespace {

Status add_output(TRITONBACKEND_Response* response, const char* name, TRITONSERVER_DataType dtype,
                  const Shape& shape, const void* data, std::size_t bytes,
                  const void* head = nullptr, std::size_t head_bytes = 0) {
  TRITONBACKEND_Output* output = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ResponseOutput, response, &output, name, dtype, shape.begin(),
                       static_cast<std::uint32_t>(shape.rank()));
  void* target = nullptr;
  TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
  std::int64_t memory_id = 0;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_OutputBuffer, output, &target, head_bytes + bytes, &memory,
                       &memory_id);
  if (memory == TRITONSERVER_MEMORY_GPU) {
    return Status(Code::kRequest, std::string("output '") + name + "'", "is wanted in GPU memory",
                  "ask for it in host memory");
  }
  if (head_bytes > 0) std::memcpy(target, head, head_bytes);
  std::memcpy(static_cast<std::uint8_t*>(target) + head_bytes, data, bytes);
  return {};
}

}  // namespace

Result<std::unique_ptr<Responder>> Responder::create(TRITONBACKEND_Request* request) {
  TRITONBACKEND_ResponseFactory* factory = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ResponseFactoryNew, &factory, request);
  return std::unique_ptr<Responder>(new Responder(factory));
}

Responder::~Responder() {
  if (!is_finished_) {
    (void)status_from_error(
        TRITONBACKEND_ResponseFactorySendFlags(factory_, TRITONSERVER_RESPONSE_COMPLETE_FINAL),
        "SendFlags");
  }
  (void)status_from_error(TRITONBACKEND_ResponseFactoryDelete(factory_), "FactoryDelete");
}

bool Responder::is_cancelled() const noexcept {
  bool is_cancelled = false;
  TRITONSERVER_Error* error = TRITONBACKEND_ResponseFactoryIsCancelled(factory_, &is_cancelled);
  if (error != nullptr) TRITONSERVER_ErrorDelete(error);
  return is_cancelled;
}

Status Responder::fill(TRITONBACKEND_Response* response, const std::string& progress,
                       const Tensors& tensors) const {
  // An element of text is its length in four bytes, then its bytes.
  const auto length = static_cast<std::uint32_t>(progress.size());
  FREEWHEEL_TRY(add_output(response, kProgress, TRITONSERVER_TYPE_BYTES, {1}, progress.data(),
                           progress.size(), &length, sizeof length));
  for (const auto& [name, tensor] : tensors) {
    const auto dtype =
        tensor.dtype == DType::kUint8 ? TRITONSERVER_TYPE_UINT8 : TRITONSERVER_TYPE_FP32;
    FREEWHEEL_TRY(
        add_output(response, name.c_str(), dtype, tensor.shape, tensor.data, tensor.bytes()));
  }
  return {};
}

Status Responder::send(const std::string& progress, const Tensors& tensors, bool is_final) {
  TRITONBACKEND_Response* response = nullptr;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ResponseNewFromFactory, &response, factory_);
  if (Status status = fill(response, progress, tensors); !status.ok()) {
    (void)status_from_error(TRITONBACKEND_ResponseDelete(response), "ResponseDelete");
    return status;
  }
  is_finished_ = is_finished_ || is_final;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_ResponseSend, response,
                       is_final ? TRITONSERVER_RESPONSE_COMPLETE_FINAL : 0u, nullptr);
  return {};
}

void Responder::send_error(const Status& status) {
  if (is_finished_) return;
  TRITONBACKEND_Response* response = nullptr;
  TRITONSERVER_Error* fault = TRITONBACKEND_ResponseNewFromFactory(&response, factory_);
  if (fault != nullptr) return TRITONSERVER_ErrorDelete(fault);
  is_finished_ = true;
  TRITONSERVER_Error* error = error_from_status(status);
  (void)status_from_error(
      TRITONBACKEND_ResponseSend(response, TRITONSERVER_RESPONSE_COMPLETE_FINAL, error),
      "ResponseSend");
  // The server copies the error.
  if (error != nullptr) TRITONSERVER_ErrorDelete(error);
}

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
#include "received_request.h"

#include <cstring>
#include <optional>

#include "error.h"
#include "try.h"

namespace freewheel::triton {
namespace {

constexpr std::uint64_t kMaxText = 1 << 20;

std::optional<DType> dtype_of(TRITONSERVER_DataType dtype) noexcept {
  if (dtype == TRITONSERVER_TYPE_FP32) return DType::kFloat32;
  if (dtype == TRITONSERVER_TYPE_FP16) return DType::kFloat16;
  if (dtype == TRITONSERVER_TYPE_BF16) return DType::kBfloat16;
  if (dtype == TRITONSERVER_TYPE_INT64) return DType::kInt64;
  return std::nullopt;
}

Status read_parameters(TRITONBACKEND_Request* request, Parameters& parameters) {
  std::uint32_t count = 0;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestParameterCount, request, &count);
  for (std::uint32_t index = 0; index < count; ++index) {
    const char* key = nullptr;
    const void* value = nullptr;
    TRITONSERVER_ParameterType type = TRITONSERVER_PARAMETER_STRING;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestParameter, request, index, &key, &type, &value);
    switch (type) {
      case TRITONSERVER_PARAMETER_STRING:
        parameters.emplace_back(key, std::string(static_cast<const char*>(value)));
        break;
      case TRITONSERVER_PARAMETER_INT:
        parameters.emplace_back(key, *static_cast<const std::int64_t*>(value));
        break;
      case TRITONSERVER_PARAMETER_BOOL:
        parameters.emplace_back(key, *static_cast<const bool*>(value));
        break;
      case TRITONSERVER_PARAMETER_DOUBLE:
        parameters.emplace_back(key, *static_cast<const double*>(value));
        break;
      case TRITONSERVER_PARAMETER_BYTES:
        return Status(Code::kRequest, std::string("parameter '") + key + "'", "holds bytes",
                      "give text, a number or a truth value");
    }
  }
  return {};
}

/// Copies an input's parts one after another.
/// @param target Bytes, as many as there should be.
Status gather(TRITONBACKEND_Input* input, const std::string& where, std::uint32_t parts,
              std::uint8_t* target, std::size_t size) {
  std::size_t filled = 0;
  for (std::uint32_t index = 0; index < parts; ++index) {
    const void* data = nullptr;
    std::uint64_t bytes = 0;
    TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
    std::int64_t memory_id = 0;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_InputBuffer, input, index, &data, &bytes, &memory,
                         &memory_id);
    if (memory == TRITONSERVER_MEMORY_GPU) {
      return Status(Code::kRequest, where, "lies in GPU memory", "send it in host memory");
    }
    if (bytes > size - filled) break;
    std::memcpy(target + filled, data, bytes);
    filled += bytes;
  }
  if (filled == size) return {};
  return Status(Code::kRequest, where,
                "has other bytes than the " + std::to_string(size) + " of its shape",
                "send shape and data that agree");
}

/// Reads one text: its length in four bytes, then the text.
Status read_text(TRITONBACKEND_Input* input, const std::string& where, std::uint32_t parts,
                 std::uint64_t bytes, std::string& text) {
  std::uint32_t length = 0;
  if (bytes > kMaxText) {
    return Status(Code::kRequest, where, "is longer than " + std::to_string(kMaxText) + " bytes",
                  "shorten the prompt");
  }
  std::vector<std::uint8_t> held(bytes);
  FREEWHEEL_TRY(gather(input, where, parts, held.data(), held.size()));
  if (bytes >= sizeof length) std::memcpy(&length, held.data(), sizeof length);
  if (bytes < sizeof length || length != bytes - sizeof length) {
    return Status(Code::kRequest, where, "is not one text", "send one element");
  }
  text.assign(held.begin() + sizeof length, held.end());
  return {};
}

Status read_tensor(TRITONBACKEND_Input* input, ReceivedRequest& received) {
  const char* name = nullptr;
  const std::int64_t* sizes = nullptr;
  std::uint32_t rank = 0, parts = 0;
  std::uint64_t bytes = 0;
  TRITONSERVER_DataType type = TRITONSERVER_TYPE_INVALID;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_InputProperties, input, &name, &type, &sizes, &rank, &bytes,
                       &parts);
  const std::string where = std::string("input '") + name + "'";
  if (type == TRITONSERVER_TYPE_BYTES) {
    return read_text(input, where, parts, bytes, received.texts[name]);
  }
  const std::optional<DType> dtype = dtype_of(type);
  if (!dtype) return Status(Code::kRequest, where, "has a datatype that no input takes");
  Shape shape;
  for (std::uint32_t axis = 0; axis < rank && axis < Shape::kMaxRank; ++axis) {
    shape.push_back(sizes[axis]);
  }
  if (shape.elements() < 1) {
    return Status(Code::kRequest, where, "is empty: " + shape.text(), "leave it out, or fill it");
  }
  FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(host_memory(), *dtype, shape));
  FREEWHEEL_TRY(
      gather(input, where, parts, buffer.view().as<std::uint8_t>(), buffer.view().bytes()));
  received.tensors[name] = buffer.view();
  received.buffers.push_back(std::move(buffer));
  return {};
}

}  // namespace

Result<ReceivedRequest> ReceivedRequest::read(TRITONBACKEND_Request* request) {
  ReceivedRequest received;
  FREEWHEEL_TRY(read_parameters(request, received.parameters));
  std::uint32_t count = 0;
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestInputCount, request, &count);
  for (std::uint32_t index = 0; index < count; ++index) {
    TRITONBACKEND_Input* input = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestInputByIndex, request, index, &input);
    FREEWHEEL_TRY(read_tensor(input, received));
  }
  FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestOutputCount, request, &count);
  for (std::uint32_t index = 0; index < count; ++index) {
    const char* name = nullptr;
    FREEWHEEL_TRITON_TRY(TRITONBACKEND_RequestOutputName, request, index, &name);
    received.outputs.insert(name);
  }
  return received;
}

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
#include "small_tensors.h"

#include <utility>

#include "freewheel/dims.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr std::size_t kSlotBytes = 256;

/// Whether an input stays as it is for a whole run.
bool is_steady(const std::string& name) {
  return name.rfind("param.", 0) == 0 || name.rfind("guard.", 0) == 0;
}

}  // namespace

Result<SmallTensors> SmallTensors::create(Memory& memory, const std::map<std::string, Io>& inputs,
                                          const std::map<std::string, Io>& outputs) {
  SmallTensors found;
  found.memory_ = &memory;
  std::vector<std::pair<std::string, std::size_t>> places;
  std::size_t total = 0;
  std::map<std::string, Io> steady, moving;
  for (const auto& [name, io] : inputs) (is_steady(name) ? steady : moving)[name] = io;
  const std::map<std::string, Io>* const groups[] = {&steady, &moving, &outputs};
  for (const auto* group : groups) {
    for (const auto& [name, io] : *group) {
      FREEWHEEL_ASSIGN(const Shape shape, shape_of(name, io, {}));
      const Tensor tensor{nullptr, io.dtype, shape};
      found.bound_[name] = tensor;
      places.emplace_back(name, total);
      total += (tensor.bytes() + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
    }
    if (group == &steady) found.steady_bytes_ = total;
    if (group == &moving) found.input_bytes_ = total;
  }
  const Shape shape{static_cast<std::int64_t>(total)};
  FREEWHEEL_ASSIGN(found.device_, Buffer::create(memory, DType::kUint8, shape));
  std::uint8_t* host = found.device_.view().as<std::uint8_t>();
  if (!memory.is_host()) {
    FREEWHEEL_ASSIGN(found.mirror_, Buffer::create(host_memory(), DType::kUint8, shape));
    host = found.mirror_.view().as<std::uint8_t>();
  }
  for (const auto& [name, offset] : places) {
    Tensor& tensor = found.bound_[name];
    tensor.data = found.device_.view().as<std::uint8_t>() + offset;
    found.host_[name] = Tensor{host + offset, tensor.dtype, tensor.shape};
  }
  return found;
}

Tensor SmallTensors::host(const std::string& name) const {
  const auto found = host_.find(name);
  return found == host_.end() ? Tensor{} : found->second;
}

void SmallTensors::set(const std::string& name, const std::vector<double>& values) {
  const Tensor tensor = host(name);
  if (tensor.data == nullptr) return;
  is_steady_set_ = is_steady_set_ || is_steady(name);
  for (std::int64_t i = 0; i < tensor.shape.elements(); ++i) {
    store_number(tensor, i, values[values.size() == 1 ? 0 : static_cast<std::size_t>(i)]);
  }
}

void SmallTensors::set(const std::string& name, double value) {
  set(name, std::vector<double>{value});
}

Status SmallTensors::upload() noexcept {
  if (mirror_.empty()) return {};
  const std::size_t begin = is_steady_set_ ? 0 : steady_bytes_;
  is_steady_set_ = false;
  return memory_->upload(device_.view().as<std::uint8_t>() + begin,
                         mirror_.view().as<std::uint8_t>() + begin, input_bytes_ - begin);
}

Status SmallTensors::download() noexcept {
  if (mirror_.empty()) return {};
  const std::size_t bytes = device_.view().bytes() - input_bytes_;
  return memory_->download(mirror_.view().as<std::uint8_t>() + input_bytes_,
                           device_.view().as<std::uint8_t>() + input_bytes_, bytes);
}

void store_number(const Tensor& tensor, std::int64_t index, double value) noexcept {
  switch (tensor.dtype) {
    case DType::kInt64:
      tensor.as<std::int64_t>()[index] = static_cast<std::int64_t>(value);
      return;
    case DType::kInt32:
      tensor.as<std::int32_t>()[index] = static_cast<std::int32_t>(value);
      return;
    case DType::kBool:
    case DType::kUint8:
      tensor.as<std::uint8_t>()[index] = value != 0.0 ? 1 : 0;
      return;
    case DType::kFloat64:
      tensor.as<double>()[index] = value;
      return;
    case DType::kFloat32:
      tensor.as<float>()[index] = static_cast<float>(value);
      return;
    case DType::kFloat16:
      tensor.as<std::uint16_t>()[index] = half_from_float(static_cast<float>(value));
      return;
    case DType::kBfloat16:
      tensor.as<std::uint16_t>()[index] = bfloat16_from_float(static_cast<float>(value));
      return;
    case DType::kFloat8E4m3fn:  // of weights alone
      return;
  }
}

}  // namespace freewheel

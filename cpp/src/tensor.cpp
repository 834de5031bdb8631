// SPDX-License-Identifier: Apache-2.0
#include "freewheel/tensor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "for_each_cpu.h"
#include "try.h"

namespace freewheel {
namespace {

struct DTypeRow {
  DType dtype;
  const char* name;
  std::size_t bytes;
};

constexpr DTypeRow kDTypes[] = {
    {DType::kFloat32, "float32", 4},
    {DType::kFloat64, "float64", 8},
    {DType::kFloat16, "float16", 2},
    {DType::kBfloat16, "bfloat16", 2},
    {DType::kInt64, "int64", 8},
    {DType::kInt32, "int32", 4},
    {DType::kBool, "bool", 1},
    {DType::kUint8, "uint8", 1},
    {DType::kFloat8E4m3fn, "float8_e4m3fn", 1},
};

constexpr std::size_t kAlignment = 64;

/// A slab whose copies are ordered with the engine calls, as everything else of the memory is.
class OrderedSlab final : public Slab {
 public:
  OrderedSlab(Memory& memory, Buffer buffer) : memory_(memory), buffer_(std::move(buffer)) {}

  void* data() const noexcept override { return buffer_.view().data; }
  Status fetch(const void* host, std::size_t bytes) noexcept override {
    return memory_.upload(data(), host, bytes);
  }
  Status take() noexcept override { return {}; }
  Status release() noexcept override { return {}; }

 private:
  Memory& memory_;
  Buffer buffer_;
};

/// Lets the system give much memory in pages of 2 MiB: a merged weight is touched 512 times
/// seldomer.
void advise_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] std::size_t bytes) noexcept {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHuge = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t end = (address + bytes) / kHuge * kHuge;
  if (begin < end) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class HostMemory final : public Memory {
 public:
  bool is_host() const noexcept override { return true; }

  Result<void*> allocate(std::size_t bytes) override {
    // `calloc` takes much memory as the system gives it, zeroed when it is touched, and by whom.
    const std::size_t room = bytes + kAlignment;
    void* start = room < bytes ? nullptr : std::calloc(room, 1);
    if (start == nullptr) {
      return Status(Code::kFailed, "memory", std::to_string(bytes) + " bytes can't be allocated",
                    "choose a smaller size");
    }
    advise_huge_pages(start, room);
    const auto address = reinterpret_cast<std::uintptr_t>(start);
    const std::size_t offset = kAlignment - address % kAlignment;
    static_assert(alignof(std::max_align_t) >= sizeof(void*), "there is room for the start");
    void** data = reinterpret_cast<void**>(static_cast<char*>(start) + offset);
    data[-1] = start;
    return static_cast<void*>(data);
  }

  void release(void* data) noexcept override {
    if (data != nullptr) std::free(static_cast<void**>(data)[-1]);
  }

  Status upload(void* target, const void* host, std::size_t bytes) noexcept override {
    return copy(target, host, bytes);
  }
  Status download(void* host, const void* source, std::size_t bytes) noexcept override {
    return copy(host, source, bytes);
  }
  Status copy(void* target, const void* source, std::size_t bytes) noexcept override {
    if (target != source && bytes != 0) std::memcpy(target, source, bytes);
    return {};
  }
  Status zero(void* target, std::size_t bytes) noexcept override {
    std::memset(target, 0, bytes);
    return {};
  }
  Status synchronize() noexcept override { return {}; }
};

std::uint32_t bits_of(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(std::uint32_t bits) noexcept {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t rounded_to_bfloat16(float value) noexcept {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<std::uint16_t>(value != value ? quiet : rounded);
}

FREEWHEEL_FOR_EACH_CPU
void widen(const std::uint16_t* from, float* to, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) to[i] = float_of(std::uint32_t{from[i]} << 16);
}

FREEWHEEL_FOR_EACH_CPU
void round_all(const float* from, std::uint16_t* to, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) to[i] = rounded_to_bfloat16(from[i]);
}

double load(const Tensor& tensor, std::int64_t index) noexcept {
  switch (tensor.dtype) {
    case DType::kFloat64:
      return tensor.as<double>()[index];
    case DType::kFloat16:
      return float_from_half(tensor.as<std::uint16_t>()[index]);
    case DType::kBfloat16:
      return float_from_bfloat16(tensor.as<std::uint16_t>()[index]);
    default:
      return tensor.as<float>()[index];
  }
}

void store(const Tensor& tensor, std::int64_t index, double value) noexcept {
  switch (tensor.dtype) {
    case DType::kFloat64:
      tensor.as<double>()[index] = value;
      return;
    case DType::kFloat16:
      tensor.as<std::uint16_t>()[index] = half_from_float(static_cast<float>(value));
      return;
    case DType::kBfloat16:
      tensor.as<std::uint16_t>()[index] = bfloat16_from_float(static_cast<float>(value));
      return;
    default:
      tensor.as<float>()[index] = static_cast<float>(value);
  }
}

bool is_float(DType dtype) noexcept {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
         dtype == DType::kBfloat16;
}

}  // namespace

std::size_t item_bytes(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].bytes;
}

const char* dtype_name(DType dtype) noexcept {
  return kDTypes[static_cast<std::size_t>(dtype)].name;
}

std::optional<DType> dtype_from_name(std::string_view name) noexcept {
  for (const DTypeRow& row : kDTypes) {
    if (name == row.name) return row.dtype;
  }
  return std::nullopt;
}

Shape::Shape(std::initializer_list<std::int64_t> sizes) noexcept {
  for (std::int64_t size : sizes) push_back(size);
}

void Shape::push_back(std::int64_t size) noexcept {
  if (rank_ < kMaxRank) sizes_[static_cast<std::size_t>(rank_++)] = size;
}

std::int64_t Shape::elements() const noexcept {
  std::int64_t product = 1;
  for (std::int64_t size : *this) product *= size;
  return product;
}

std::string Shape::text() const {
  std::string text = "[";
  for (int axis = 0; axis < rank_; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string((*this)[axis]);
  }
  return text + "]";
}

bool operator==(const Shape& a, const Shape& b) noexcept {
  return a.rank_ == b.rank_ && std::equal(a.begin(), a.end(), b.begin());
}

Status Memory::lock(void*, std::size_t) { return {}; }
void Memory::unlock(void*) noexcept {}

Result<std::unique_ptr<Slab>> Memory::slab(std::size_t bytes) {
  FREEWHEEL_ASSIGN(Buffer buffer,
                   Buffer::create(*this, DType::kUint8, Shape{static_cast<std::int64_t>(bytes)}));
  return std::unique_ptr<Slab>(std::make_unique<OrderedSlab>(*this, std::move(buffer)));
}

Memory& host_memory() noexcept {
  static HostMemory memory;
  return memory;
}

Buffer::Buffer(Buffer&& other) noexcept : memory_(other.memory_), view_(other.view_) {
  other.memory_ = nullptr;
  other.view_ = {};
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(view_, other.view_);
  return *this;
}

Buffer::~Buffer() {
  if (memory_ != nullptr) memory_->release(view_.data);
}

Result<Buffer> Buffer::create(Memory& memory, DType dtype, const Shape& shape) {
  Buffer buffer;
  buffer.view_ = Tensor{nullptr, dtype, shape};
  auto data = memory.allocate(buffer.view_.bytes());
  if (!data.ok()) return std::move(data).status();
  buffer.view_.data = data.value();
  buffer.memory_ = &memory;
  return buffer;
}

float float_from_bfloat16(std::uint16_t bits) noexcept {
  return float_of(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t bfloat16_from_float(float value) noexcept { return rounded_to_bfloat16(value); }

float float_from_half(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0x1fu) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -magnitude : magnitude;
}

std::uint16_t half_from_float(float value) noexcept {
  const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 6.103515625e-05f) {  // subnormal: multiples of 2^-24
    return static_cast<std::uint16_t>(
        sign | static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  const std::uint32_t bits = bits_of(magnitude);
  const std::uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

bool is_finite(const Tensor& tensor) noexcept {
  const std::int64_t count = tensor.shape.elements();
  // Infinities and NaNs are the values whose exponent bits are all set.
  const auto scan = [&](const auto* bits, auto exponent) {
    bool found = false;
    for (std::int64_t i = 0; i < count; ++i) found |= (bits[i] & exponent) == exponent;
    return !found;
  };
  switch (tensor.dtype) {
    case DType::kFloat32:
      return scan(tensor.as<std::uint32_t>(), std::uint32_t{0x7f800000});
    case DType::kFloat64:
      return scan(tensor.as<std::uint64_t>(), std::uint64_t{0x7ff0000000000000});
    case DType::kFloat16:
      return scan(tensor.as<std::uint16_t>(), std::uint16_t{0x7c00});
    case DType::kBfloat16:
      return scan(tensor.as<std::uint16_t>(), std::uint16_t{0x7f80});
    default:
      return true;
  }
}

namespace {

/// The largest number up to which float32 has every whole one.
constexpr float kMostWhole = 16777216.0f;

bool is_whole(DType dtype) noexcept {
  return dtype == DType::kInt64 || dtype == DType::kInt32 || dtype == DType::kBool;
}

/// Takes numbers for the whole ones that they are: indices and masks of callers who have floats.
Status convert_to_whole(const Tensor& source, const Tensor& target) {
  const float* from = source.as<float>();
  const float most = target.dtype == DType::kBool ? 1.0f : kMostWhole;
  for (std::int64_t i = 0; i < source.shape.elements(); ++i) {
    const float value = from[i];
    if (!(std::fabs(value) <= most) || value != std::floor(value)) {
      return Status(Code::kRequest, "tensor",
                    "holds " + std::to_string(value) + ", and is to be " + dtype_name(target.dtype),
                    "give whole numbers");
    }
    if (target.dtype == DType::kBool) target.as<std::uint8_t>()[i] = value != 0.0f ? 1 : 0;
    if (target.dtype == DType::kInt32)
      target.as<std::int32_t>()[i] = static_cast<std::int32_t>(value);
    if (target.dtype == DType::kInt64)
      target.as<std::int64_t>()[i] = static_cast<std::int64_t>(value);
  }
  return {};
}

}  // namespace

Status convert(const Tensor& source, const Tensor& target) {
  if (source.shape.elements() != target.shape.elements()) {
    return Status(Code::kInternal, "convert",
                  "shapes " + source.shape.text() + " and " + target.shape.text() + " differ");
  }
  if (source.dtype == target.dtype) {
    return host_memory().copy(target.data, source.data, source.bytes());
  }
  if (source.dtype == DType::kFloat32 && is_whole(target.dtype)) {
    return convert_to_whole(source, target);
  }
  if (!is_float(source.dtype) || !is_float(target.dtype)) {
    return Status(Code::kRequest, "tensor",
                  std::string("dtype is ") + dtype_name(source.dtype) + ", expected " +
                      dtype_name(target.dtype),
                  "give a tensor of that dtype");
  }
  const std::int64_t count = source.shape.elements();
  if (source.dtype == DType::kBfloat16 && target.dtype == DType::kFloat32) {
    widen(source.as<std::uint16_t>(), target.as<float>(), count);
    return {};
  }
  if (source.dtype == DType::kFloat32 && target.dtype == DType::kBfloat16) {
    round_all(source.as<float>(), target.as<std::uint16_t>(), count);
    return {};
  }
  for (std::int64_t i = 0; i < count; ++i) store(target, i, load(source, i));
  return {};
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Typed views of memory, and the memory behind them.

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "freewheel/status.h"

namespace freewheel {

enum class DType : std::uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBfloat16,
  kInt64,
  kInt32,
  kBool,
  kUint8,
  kFloat8E4m3fn,
};

/// Bytes of one element.
std::size_t item_bytes(DType dtype) noexcept;

/// Spells a dtype as manifests do: "float32", "bool", ….
const char* dtype_name(DType dtype) noexcept;

/// Reads what `dtype_name` spells.
std::optional<DType> dtype_from_name(std::string_view name) noexcept;

/// Sizes of a tensor, of rank 8 at most; owns no heap memory.
class Shape {
 public:
  static constexpr int kMaxRank = 8;

  Shape() noexcept = default;
  Shape(std::initializer_list<std::int64_t> sizes) noexcept;

  int rank() const noexcept { return rank_; }
  std::int64_t operator[](int axis) const noexcept {
    return sizes_[static_cast<std::size_t>(axis)];
  }
  const std::int64_t* begin() const noexcept { return sizes_.data(); }
  const std::int64_t* end() const noexcept { return sizes_.data() + rank_; }

  /// Appends a size; ignored beyond the largest rank.
  void push_back(std::int64_t size) noexcept;

  /// Product of all sizes; 1 for a scalar.
  std::int64_t elements() const noexcept;

  /// "[1, 16, 5]".
  std::string text() const;

  friend bool operator==(const Shape& a, const Shape& b) noexcept;
  friend bool operator!=(const Shape& a, const Shape& b) noexcept { return !(a == b); }

 private:
  std::array<std::int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

/// A contiguous, row-major view of memory that somebody else owns.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Shape shape;

  std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(shape.elements()) * item_bytes(dtype);
  }
  template <typename T>
  T* as() const noexcept {
    return static_cast<T*>(data);
  }
};

/// Tensors by name. Views: what they point to must outlive the map.
using Tensors = std::map<std::string, Tensor>;

/// A piece of a backend's memory that is filled from the host while engines run, again and again.
class Slab {
 public:
  virtual ~Slab() = default;

  virtual void* data() const noexcept = 0;

  /// Begins to copy `bytes` bytes of locked memory here, once `release` was passed.
  virtual Status fetch(const void* host, std::size_t bytes) noexcept = 0;

  /// Has the engine calls that follow wait for the copy.
  virtual Status take() noexcept = 0;

  /// Notes that the engine calls so far are the last that read what is here.
  virtual Status release() noexcept = 0;
};

/// Where a backend's tensors live. Calls are ordered with the backend's engine calls.
class Memory {
 public:
  virtual ~Memory() = default;

  /// Whether the CPU may read and write this memory by its address.
  virtual bool is_host() const noexcept = 0;

  /// Returns at least `bytes` zeroed bytes, aligned to 64 (256 on devices).
  virtual Result<void*> allocate(std::size_t bytes) = 0;
  virtual void release(void* data) noexcept = 0;

  virtual Status upload(void* target, const void* host, std::size_t bytes) noexcept = 0;
  virtual Status download(void* host, const void* source, std::size_t bytes) noexcept = 0;
  virtual Status copy(void* target, const void* source, std::size_t bytes) noexcept = 0;
  virtual Status zero(void* target, std::size_t bytes) noexcept = 0;

  /// Waits until everything enqueued so far is done.
  virtual Status synchronize() noexcept = 0;

  /// Locks host memory for `Slab::fetch`, where that is any use; `unlock` waits for copies.
  virtual Status lock(void* host, std::size_t bytes);
  virtual void unlock(void* host) noexcept;

  /// Allocates a slab. This memory must outlive it.
  virtual Result<std::unique_ptr<Slab>> slab(std::size_t bytes);
};

/// Ordinary memory of the CPU. Thread-safe; lives for the whole process.
Memory& host_memory() noexcept;

/// A tensor that owns its memory. Movable; views of it stay valid when it is moved.
class Buffer {
 public:
  Buffer() noexcept = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  /// Allocates zeroed memory. `memory` must outlive the buffer.
  static Result<Buffer> create(Memory& memory, DType dtype, const Shape& shape);

  const Tensor& view() const noexcept { return view_; }
  bool empty() const noexcept { return view_.data == nullptr; }

 private:
  Memory* memory_ = nullptr;
  Tensor view_;
};

/// Converts float16 or bfloat16 bits to float32.
float float_from_half(std::uint16_t bits) noexcept;
float float_from_bfloat16(std::uint16_t bits) noexcept;

/// Rounds float32 to the nearest bits, ties to even.
std::uint16_t half_from_float(float value) noexcept;
std::uint16_t bfloat16_from_float(float value) noexcept;

/// Whether every element of a host tensor of a float dtype is finite; true for other dtypes.
bool is_finite(const Tensor& tensor) noexcept;

/// Copies host elements between float dtypes (float32, float64, float16, bfloat16), or equal
/// dtypes.
Status convert(const Tensor& source, const Tensor& target);

}  // namespace freewheel

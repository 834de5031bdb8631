// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Files of tensors: mapped safetensors, NumPy's .npy, and pictures.

#include <cstdint>
#include <map>
#include <string>

#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// A whole file mapped copy-on-write: readable, and never written back. Move-only.
class MappedFile {
 public:
  MappedFile() noexcept = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  /// Maps `path`; an empty file maps to null. `code` is that of the failure's status.
  static Result<MappedFile> open(const std::string& path, Code code = Code::kBundle);

  std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Reads a text file of at most `limit` bytes.
Result<std::string> read_text(const std::string& path, std::size_t limit, Code code);

/// A safetensors file, mapped. Its tensors are views that live as long as it does.
struct SafetensorsFile {
  MappedFile file;
  Tensors tensors;
  std::map<std::string, std::string> metadata;

  static Result<SafetensorsFile> open(const std::string& path, Code code = Code::kRequest);
};

/// Writes host tensors to a safetensors file.
Status write_safetensors(const std::string& path, const Tensors& tensors);

/// Reads a .npy array (C order, little endian; float16, float32, float64, int32, int64, bool).
Result<Buffer> read_npy(const std::string& path);

/// Writes a host tensor as .npy.
Status write_npy(const std::string& path, const Tensor& tensor);

/// Writes 8-bit RGB pixels [height, width, 3] as PNG.
Status write_png(const std::string& path, const std::uint8_t* pixels, std::int64_t height,
                 std::int64_t width);

/// Writes bytes to a file.
Status write_bytes(const std::string& path, const void* data, std::size_t bytes);

}  // namespace freewheel

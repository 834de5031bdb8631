// SPDX-License-Identifier: Apache-2.0
#pragma once

/// LoRA files that `freewheel lora` wrote for a bundle, and weights that they change.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "freewheel/bundle.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// A LoRA that a run is to have.
struct LoraUse {
  std::string path;  ///< A file that `freewheel lora` wrote.
  double scale = 1.0;
  std::int64_t written = 0;  ///< When the file was written last, so that a replaced one is noticed.

  friend bool operator==(const LoraUse& a, const LoraUse& b) noexcept {
    return a.path == b.path && a.scale == b.scale && a.written == b.written;
  }
};

/// Reads "name:0.8,other" as files `name.safetensors` and `other.safetensors` of a folder; a scale
/// that is not said is 1. Refuses names that are not plain, and such as have no file.
/// @param folder The only folder that requests may read; empty refuses every name.
Result<std::vector<LoraUse>> find_loras(const std::string& folder, const std::string& text);

/// A mapped LoRA, checked against the bundle: every weight that it changes is there, of a float
/// dtype and of the shape of the change.
class Lora {
 public:
  /// What changes one weight W [rows, columns…]: W + scale · (up · down, or difference). A
  /// magnitude (DoRA) multiplies all so far by what gives rows of the bundle's W + scale · up ·
  /// down its length.
  struct Change {
    Tensor down;        ///< float32 [rank, columns…]
    Tensor up;          ///< float32 [rows, rank]
    Tensor magnitude;   ///< float32 [rows], or no data.
    Tensor difference;  ///< float32 [rows, columns…]; no data where there is a pair.
  };

  static Result<Lora> open(const Bundle& bundle, const LoraUse& use);

  double scale() const noexcept { return scale_; }

  /// By the bundle's tensor names.
  const std::map<std::string, Change>& changes() const noexcept { return changes_; }

 private:
  Status check(const Bundle& bundle, const std::string& path) const;

  SafetensorsFile file_;
  double scale_ = 1.0;
  std::map<std::string, Change> changes_;
};

/// Opens every file, without computing anything.
Result<std::vector<Lora>> open_loras(const Bundle& bundle, const std::vector<LoraUse>& uses);

/// Host weights by tensor name.
using Weights = std::map<std::string, Buffer>;

/// Merges LoRAs in their order into copies of the weights that they change, in float32, and rounds
/// to the weight's dtype.
/// @param threads CPU threads; 0 takes every core.
Result<Weights> merge_loras(const Bundle& bundle, const std::vector<Lora>& loras, int threads);

}  // namespace freewheel

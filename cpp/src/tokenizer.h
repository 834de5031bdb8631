// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Text → token ids, by the graph that a bundle carries of its pipeline's tokenizer.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "freewheel/status.h"

namespace freewheel {

/// A compiled tokenizer. One thread uses it at a time.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Returns the ids of UTF-8 text, the end token included.
  virtual Result<std::vector<std::int64_t>> ids(const std::string& text) = 0;
};

/// Compiles the graph in `file` (.xml). Fails where this library was built without OpenVINO, or
/// where OpenVINO's tokenizers can't be found.
Result<std::unique_ptr<Tokenizer>> load_tokenizer(const std::string& file);

/// Whether bytes are well-formed UTF-8.
bool is_utf8(const std::string& text) noexcept;

}  // namespace freewheel

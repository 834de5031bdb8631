// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Buffers of declared tensors.

#include <map>
#include <string>
#include <vector>

#include "freewheel/manifest.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// Owns buffers for declared tensors.
class BufferSet {
 public:
  /// Allocates one buffer per entry, and adds its view to `views`.
  Status allocate(Memory& memory, const std::map<std::string, Io>& entries, const Dims& dims,
                  Tensors& views);
  Status allocate(Memory& memory, const std::string& name, const Io& io, const Dims& dims,
                  Tensors& views);

 private:
  std::vector<Buffer> buffers_;
};

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "buffer_set.h"

#include "freewheel/dims.h"
#include "try.h"

namespace freewheel {

Status BufferSet::allocate(Memory& memory, const std::string& name, const Io& io, const Dims& dims,
                           Tensors& views) {
  FREEWHEEL_ASSIGN(const Shape shape, shape_of(name, io, dims));
  FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(memory, io.dtype, shape));
  views[name] = buffer.view();
  buffers_.push_back(std::move(buffer));
  return {};
}

Status BufferSet::allocate(Memory& memory, const std::map<std::string, Io>& entries,
                           const Dims& dims, Tensors& views) {
  for (const auto& [name, io] : entries) FREEWHEEL_TRY(allocate(memory, name, io, dims, views));
  return {};
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
// The entry of libFuzzer; FREEWHEEL_READER is one of readers.h.
#include "readers.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  freewheel::fuzz::FREEWHEEL_READER(data, size);
  return 0;
}

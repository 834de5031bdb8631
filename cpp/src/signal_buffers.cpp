// SPDX-License-Identifier: Apache-2.0
#include "signal_buffers.h"

namespace freewheel {

void SignalBuffers::reset() noexcept {
  const int last = static_cast<int>(count()) - 1;
  stand_ = {last, keeps_previous_ ? last : -1, keeps_computed_ ? last : -1};
}

std::size_t SignalBuffers::advance() noexcept {
  const int previous = keeps_previous_ ? stand_.current : -1;
  int current = 0;
  while (current == previous || current == stand_.computed) ++current;
  stand_ = {current, previous, stand_.computed};
  return static_cast<std::size_t>(current);
}

std::vector<SignalBuffers::Stand> SignalBuffers::stands() const {
  const int buffers = static_cast<int>(count());
  std::vector<Stand> found;
  for (int current = 0; current < buffers; ++current) {
    for (int previous = keeps_previous_ ? 0 : -1; previous < (keeps_previous_ ? buffers : 0);
         ++previous) {
      for (int computed = keeps_computed_ ? 0 : -1; computed < (keeps_computed_ ? buffers : 0);
           ++computed) {
        if (current != previous && current != computed)
          found.push_back({current, previous, computed});
      }
    }
  }
  return found;
}

}  // namespace freewheel

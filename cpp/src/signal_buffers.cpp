// SPDX-License-Identifier: Apache-2.0
#include "signal_buffers.h"

namespace freewheel {

void SignalBuffers::reset() noexcept {
  const int last = static_cast<int>(count()) - 1;
  stand_ = {last, keeps_previous_ ? last : -1, keeps_computed_ ? last : -1,
            keeps_older_ ? last : -1};
}

std::size_t SignalBuffers::advance() noexcept {
  const int previous = keeps_previous_ ? stand_.current : -1;
  int current = 0;
  while (current == previous || current == stand_.computed || current == stand_.older) ++current;
  stand_ = {current, previous, stand_.computed, stand_.older};
  return static_cast<std::size_t>(current);
}

std::vector<SignalBuffers::Stand> SignalBuffers::stands() const {
  std::vector<Stand> found;
  std::vector<bool> is_known(kKeys);
  SignalBuffers walk = *this;
  walk.reset();
  std::vector<Stand> left = {walk.stand_};
  while (!left.empty()) {
    walk.stand_ = left.back();
    left.pop_back();
    walk.advance();
    const Stand stand = walk.stand_;
    if (is_known[key(stand)]) continue;
    is_known[key(stand)] = true;
    found.push_back(stand);
    left.push_back(stand);
    walk.mark_computed();
    left.push_back(walk.stand_);
  }
  return found;
}

}  // namespace freewheel

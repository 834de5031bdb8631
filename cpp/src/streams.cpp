// SPDX-License-Identifier: Apache-2.0
#include "streams.h"

namespace freewheel {
namespace {

bool ends_with(const std::string& name, const std::string& end) noexcept {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::string stream_of(const std::string& output) {
  const bool is_stream = output.size() > sizeof kOut - 1 && ends_with(output, kOut);
  return is_stream ? output.substr(0, output.size() - (sizeof kOut - 1)) : std::string();
}

std::string beside(const std::string& name, const std::string& of, const std::string& wanted) {
  return (ends_with(name, of) ? name.substr(0, name.size() - of.size()) : name) + wanted;
}

std::string kept_name(const std::string& stream, const std::string& wanted) {
  return ends_with(stream, kHidden) ? beside(stream, kHidden, wanted) : stream + "_" + wanted;
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <sstream>
#include <string>

namespace freewheel {

/// Picks the telling line of OpenVINO's exception: the last that is no C++ location.
inline std::string fault_text(const std::exception& fault) {
  std::istringstream lines(fault.what());
  std::string line, telling = "unknown fault";
  while (std::getline(lines, line)) {
    const auto begin = line.find_first_not_of(" \t");
    if (begin == std::string::npos) continue;
    line = line.substr(begin);
    if (line.rfind("Exception from", 0) != 0 && line.rfind("Check '", 0) != 0) telling = line;
  }
  return telling;
}

}  // namespace freewheel

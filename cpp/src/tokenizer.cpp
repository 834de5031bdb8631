// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.h"

namespace freewheel {
namespace {

/// Returns the bytes of the character that begins with `first`; 0 where none does.
std::size_t length_of(unsigned char first) noexcept {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first < 0xE0) return 2;
  if (first >= 0xE0 && first < 0xF0) return 3;
  return first >= 0xF0 && first < 0xF5 ? 4 : 0;
}

/// Whether the second byte keeps a character from being overlong, a surrogate, or beyond Unicode.
bool is_second(unsigned char first, unsigned char second) noexcept {
  const unsigned char least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned char most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  return second >= least && second <= most;
}

}  // namespace

bool is_utf8(const std::string& text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const auto first = static_cast<unsigned char>(text[at]);
    const std::size_t length = length_of(first);
    if (length == 0 || length > text.size() - at) return false;
    for (std::size_t next = 1; next < length; ++next) {
      const auto byte = static_cast<unsigned char>(text[at + next]);
      if (next == 1 ? !is_second(first, byte) : (byte & 0xC0) != 0x80) return false;
    }
    at += length;
  }
  return true;
}

#ifndef FREEWHEEL_OPENVINO
Result<std::unique_ptr<Tokenizer>> load_tokenizer(const std::string&) {
  return Status(Code::kBackend, "tokenizer", "needs OpenVINO, and this library was built without",
                "give the prompt's token ids");
}
#endif

}  // namespace freewheel

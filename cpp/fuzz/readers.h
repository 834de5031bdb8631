// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What is fuzzed: every reader of files that nobody vouches for, as a function of bytes.

#include <cstddef>
#include <cstdint>

namespace freewheel::fuzz {

using Reader = void (*)(const std::uint8_t* data, std::size_t size);

void read_manifest(const std::uint8_t* data, std::size_t size);
void read_safetensors(const std::uint8_t* data, std::size_t size);
void read_npy(const std::uint8_t* data, std::size_t size);
void read_engine_record(const std::uint8_t* data, std::size_t size);

/// Values of overrides, one a line: `name=JSON`.
void read_overrides(const std::uint8_t* data, std::size_t size);

struct Row {
  const char* name;  ///< That of its corpus, too.
  Reader reader;
};

constexpr Row kReaders[] = {{"manifest", read_manifest},
                            {"safetensors", read_safetensors},
                            {"npy", read_npy},
                            {"engine_record", read_engine_record},
                            {"overrides", read_overrides}};

}  // namespace freewheel::fuzz

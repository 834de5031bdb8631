// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The largest values that a manifest or a request may hold.

#include <cstddef>
#include <cstdint>
#include <limits>

namespace freewheel {

inline constexpr std::int64_t kMaxSize = std::int64_t{1} << 48;
inline constexpr std::size_t kMaxEntries = 1'000'000;
inline constexpr std::int64_t kMaxBlocks = 4096;
inline constexpr std::size_t kMaxExperts = 16;
inline constexpr std::int64_t kMaxHistory = 64;
inline constexpr std::int64_t kMaxSmallElements = 65536;
inline constexpr std::size_t kMaxPromised = 200;
inline constexpr std::int64_t kMaxLatentScale = 1024;
inline constexpr std::int64_t kMaxVideoSide = 1 << 15;  ///< Pixels of a side, and frames.
inline constexpr std::int64_t kMaxSeed = std::numeric_limits<std::int64_t>::max();

}  // namespace freewheel

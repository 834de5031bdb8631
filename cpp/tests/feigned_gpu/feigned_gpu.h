// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What the feigned CUDA and the feigned TensorRT share.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime_api.h"

namespace feigned {

using Work = std::function<void()>;

}  // namespace feigned

struct CUgraph_st {
  std::vector<feigned::Work> works;
  bool is_broken = false;
};

struct CUgraphExec_st {
  std::vector<feigned::Work> works;
};

struct CUstream_st {
  std::deque<feigned::Work> queue;
  CUgraph_st* capture = nullptr;
};

struct CUevent_st {
  std::shared_ptr<bool> done;  ///< Of its last record; null before the first.
  CUstream_st* stream = nullptr;
};

namespace feigned {

/// One for the whole device.
std::recursive_mutex& mutex();

/// Whether device memory holds the whole range.
bool is_allocated(const void* data, std::size_t bytes);

/// Puts work on a stream, or into the graph that is captured from it.
cudaError_t push(CUstream_st* stream, Work work);

/// Does a stream's work, up to where `until` becomes true if it is given.
void drain(CUstream_st& stream, const bool* until = nullptr);

}  // namespace feigned

// SPDX-License-Identifier: Apache-2.0
/// A GPU made of host memory that puts work off for as long as CUDA's rules allow, so that what
/// lacks a wait reads a wrong number. Streams other than a process's first run ahead where
/// FREEWHEEL_FEIGNED_COPIES is "early", and late as the first does where it is not.

#include <cstdlib>
#include <cstring>

#include "feigned_gpu.h"

namespace feigned {
namespace {

std::map<std::uintptr_t, std::size_t>& allocated() {
  static std::map<std::uintptr_t, std::size_t> ranges;
  return ranges;
}

std::map<std::uintptr_t, std::size_t>& registered() {
  static std::map<std::uintptr_t, std::size_t> ranges;
  return ranges;
}

std::vector<CUstream_st*>& streams() {
  static std::vector<CUstream_st*> all;
  return all;
}

bool holds(const std::map<std::uintptr_t, std::size_t>& ranges, const void* data,
           std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  auto after = ranges.upper_bound(address);
  if (after == ranges.begin()) return false;
  --after;
  return address + bytes <= after->first + after->second;
}

/// What no stream may do between the begin and the end of its capture.
bool breaks_a_capture() {
  bool breaks = false;
  for (CUstream_st* stream : streams()) {
    if (stream->capture == nullptr) continue;
    stream->capture->is_broken = breaks = true;
  }
  return breaks;
}

void drain_all() {
  for (CUstream_st* stream : streams()) drain(*stream);
}

}  // namespace

std::recursive_mutex& mutex() {
  static std::recursive_mutex one;
  return one;
}

bool is_allocated(const void* data, std::size_t bytes) { return holds(allocated(), data, bytes); }

void drain(CUstream_st& stream, const bool* until) {
  while (!stream.queue.empty() && (until == nullptr || !*until)) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
  }
}

cudaError_t push(CUstream_st* stream, Work work) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (stream == nullptr)
    return cudaErrorInvalidValue;  // the legacy stream, which nothing here uses
  if (stream->capture != nullptr) {
    stream->capture->works.push_back(std::move(work));
    return cudaSuccess;
  }
  stream->queue.push_back(std::move(work));
  const char* mode = std::getenv("FREEWHEEL_FEIGNED_COPIES");
  const bool is_early = mode != nullptr && std::strcmp(mode, "early") == 0;
  if (is_early && stream != streams().front()) drain(*stream);
  return cudaSuccess;
}

}  // namespace feigned

using feigned::mutex;
using feigned::push;
using Lock = std::lock_guard<std::recursive_mutex>;

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 9;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Feigned GPU");
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const Lock lock(mutex());
  if (feigned::breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*memory, 0xFF, bytes);  // not a number
  feigned::allocated()[reinterpret_cast<std::uintptr_t>(*memory)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  const Lock lock(mutex());
  if (memory == nullptr) return cudaSuccess;
  if (feigned::breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  feigned::drain_all();
  if (feigned::allocated().erase(reinterpret_cast<std::uintptr_t>(memory)) == 0) {
    return cudaErrorInvalidValue;
  }
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned int) {
  const Lock lock(mutex());
  feigned::registered()[reinterpret_cast<std::uintptr_t>(memory)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  const Lock lock(mutex());
  const bool was = feigned::registered().erase(reinterpret_cast<std::uintptr_t>(memory)) == 1;
  return was ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return push(stream, [=] { std::memset(memory, value, bytes); });
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Lock lock(mutex());
  if (kind == cudaMemcpyDeviceToHost) {  // to memory that is not locked: done when this returns
    if (stream->capture != nullptr) return cudaErrorStreamCaptureUnsupported;
    feigned::drain(*stream);
    std::memcpy(target, source, bytes);
    return cudaSuccess;
  }
  if (kind == cudaMemcpyHostToDevice && !feigned::holds(feigned::registered(), source, bytes)) {
    if (stream->capture != nullptr) return cudaErrorStreamCaptureUnsupported;
    const auto* first = static_cast<const unsigned char*>(source);  // read before this returns
    const auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
    return push(stream, [=] { std::memcpy(target, staged->data(), bytes); });
  }
  return push(stream, [=] { std::memcpy(target, source, bytes); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  const Lock lock(mutex());
  if (flags != cudaStreamNonBlocking) return cudaErrorInvalidValue;
  feigned::streams().push_back(*stream = new CUstream_st());
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(mutex());
  feigned::drain(*stream);
  auto& all = feigned::streams();
  all.erase(std::find(all.begin(), all.end(), stream));
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(mutex());
  if (feigned::breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  feigned::drain(*stream);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  *event = new CUevent_st();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(mutex());
  event->done = std::make_shared<bool>(false);
  event->stream = stream;
  return push(stream, [done = event->done] { *done = true; });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  const Lock lock(mutex());
  if (event->done == nullptr) return cudaSuccess;  // never recorded: CUDA waits for nothing
  return push(stream, [done = event->done, source = event->stream] {
    feigned::drain(*source, done.get());
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(mutex());
  if (stream == nullptr || stream->capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  stream->capture = new CUgraph_st();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(mutex());
  *graph = stream->capture;
  stream->capture = nullptr;
  if (!(*graph)->is_broken) return cudaSuccess;
  delete *graph;
  *graph = nullptr;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* launchable, cudaGraph_t graph,
                                 unsigned long long) {
  *launchable = new CUgraphExec_st{graph->works};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t launchable, cudaStream_t stream) {
  for (const feigned::Work& work : launchable->works) {
    if (const cudaError_t error = push(stream, work); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t launchable) {
  const Lock lock(mutex());
  if (feigned::breaks_a_capture()) return cudaErrorStreamCaptureUnsupported;
  delete launchable;
  return cudaSuccess;
}

}  // extern "C"

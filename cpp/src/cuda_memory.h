// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Memory of a CUDA device, and what runs on its stream.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "freewheel/tensor.h"
#include "try.h"

namespace freewheel {

inline constexpr std::uintptr_t kAlignment = 256;  // of every address that TensorRT is given

inline Status cuda(cudaError_t error, const char* what) noexcept {
  if (error == cudaSuccess) return {};
  return Status(Code::kFailed, what, cudaGetErrorString(error), "look at the GPU with nvidia-smi");
}

/// Device memory that a stream of its own fills while the engines' stream runs.
class CudaSlab final : public Slab {
 public:
  CudaSlab(Buffer memory, cudaStream_t engines, cudaStream_t copies)
      : memory_(std::move(memory)), engines_(engines), copies_(copies) {}
  ~CudaSlab() override {
    cudaStreamSynchronize(copies_);
    for (const cudaEvent_t event : {arrived_, free_}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }

  Status open() {
    for (cudaEvent_t* event : {&arrived_, &free_}) {
      FREEWHEEL_TRY(cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "CUDA event"));
    }
    return release();  // the memory was zeroed on the engines' stream
  }

  void* data() const noexcept override { return memory_.view().data; }

  Status fetch(const void* host, std::size_t bytes) noexcept override {
    FREEWHEEL_TRY(cuda(cudaStreamWaitEvent(copies_, free_, 0), "CUDA stream"));
    FREEWHEEL_TRY(
        cuda(cudaMemcpyAsync(data(), host, bytes, cudaMemcpyHostToDevice, copies_), "GPU memory"));
    return cuda(cudaEventRecord(arrived_, copies_), "CUDA event");
  }
  Status take() noexcept override {
    return cuda(cudaStreamWaitEvent(engines_, arrived_, 0), "CUDA stream");
  }
  Status release() noexcept override {
    return cuda(cudaEventRecord(free_, engines_), "CUDA event");
  }

 private:
  Buffer memory_;
  cudaStream_t engines_, copies_;
  cudaEvent_t arrived_ = nullptr, free_ = nullptr;
};

/// Device memory on one stream, and a second one for copies beside the first one's work.
class CudaMemory final : public Memory {
 public:
  explicit CudaMemory(int device) : device_(device) {}
  ~CudaMemory() override {
    for (const cudaStream_t stream : {stream_, copies_}) {
      if (stream != nullptr) cudaStreamDestroy(stream);
    }
  }

  Status open() {
    FREEWHEEL_TRY(cuda(cudaSetDevice(device_), "GPU"));
    // A blocking stream would wait for whatever the process does on the default one.
    FREEWHEEL_TRY(cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA stream"));
    return cuda(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "CUDA stream");
  }
  cudaStream_t stream() const noexcept { return stream_; }

  /// The runtime's current device is a property of the thread.
  Status select() const noexcept { return cuda(cudaSetDevice(device_), "GPU"); }

  bool is_host() const noexcept override { return false; }

  Result<void*> allocate(std::size_t bytes) override {
    FREEWHEEL_TRY(select());
    void* data = nullptr;
    if (Status status = cuda(cudaMalloc(&data, bytes == 0 ? 1 : bytes), "GPU memory");
        !status.ok()) {
      return Status(Code::kFailed, "GPU memory",
                    std::to_string(bytes) + " bytes can't be allocated: " + status.what(),
                    "choose a smaller size or another GPU");
    }
    Status status = zero(data, bytes);
    if (!status.ok()) {
      cudaFree(data);
      return status;
    }
    return data;
  }
  void release(void* data) noexcept override { cudaFree(data); }

  Status upload(void* target, const void* host, std::size_t bytes) noexcept override {
    return move(target, host, bytes, cudaMemcpyHostToDevice);
  }
  Status download(void* host, const void* source, std::size_t bytes) noexcept override {
    FREEWHEEL_TRY(move(host, source, bytes, cudaMemcpyDeviceToHost));
    return synchronize();
  }
  Status copy(void* target, const void* source, std::size_t bytes) noexcept override {
    return move(target, source, bytes, cudaMemcpyDeviceToDevice);
  }
  Status zero(void* target, std::size_t bytes) noexcept override {
    return cuda(cudaMemsetAsync(target, 0, bytes, stream_), "GPU memory");
  }
  Status synchronize() noexcept override {
    return cuda(cudaStreamSynchronize(stream_), "CUDA stream");
  }

  Status lock(void* host, std::size_t bytes) override {
    Status status = cuda(cudaHostRegister(host, bytes, cudaHostRegisterDefault), "host memory");
    if (status.ok()) return status;
    return Status(Code::kRequest, "offload",
                  std::to_string(bytes) + " bytes of host memory can't be locked: " + status.what(),
                  "raise 'ulimit -l', free memory, or leave offload out");
  }
  void unlock(void* host) noexcept override {
    cudaStreamSynchronize(copies_);
    cudaHostUnregister(host);
  }
  Result<std::unique_ptr<Slab>> slab(std::size_t bytes) override {
    FREEWHEEL_TRY(select());
    FREEWHEEL_ASSIGN(Buffer buffer,
                     Buffer::create(*this, DType::kUint8, Shape{static_cast<std::int64_t>(bytes)}));
    auto slab = std::make_unique<CudaSlab>(std::move(buffer), stream_, copies_);
    FREEWHEEL_TRY(slab->open());
    return std::unique_ptr<Slab>(std::move(slab));
  }

 private:
  Status move(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind) noexcept {
    return cuda(cudaMemcpyAsync(target, source, bytes, kind, stream_), "GPU memory");
  }

  int device_;
  cudaStream_t stream_ = nullptr, copies_ = nullptr;
};

/// A recorded CUDA graph that can be launched.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { reset(); }

  bool empty() const noexcept { return launchable_ == nullptr; }

  void reset() noexcept {
    if (launchable_ != nullptr) cudaGraphExecDestroy(launchable_);
    launchable_ = nullptr;
  }

  /// Records what `enqueue` puts on `stream`; its failure is reported before that of the capture.
  template <typename Enqueue>
  Status record(cudaStream_t stream, Enqueue enqueue) noexcept {
    reset();
    // Other threads may go on using the device: TensorRT-RTX compiles on threads of its own.
    FREEWHEEL_TRY(
        cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "CUDA graph"));
    Status enqueued = enqueue();
    cudaGraph_t captured = nullptr;
    Status ended = cuda(cudaStreamEndCapture(stream, &captured), "CUDA graph");
    if (enqueued.ok() && ended.ok()) {
      ended = cuda(cudaGraphInstantiate(&launchable_, captured, 0), "CUDA graph");
    }
    if (captured != nullptr) cudaGraphDestroy(captured);
    return enqueued.ok() ? ended : enqueued;
  }

  Status launch(cudaStream_t stream) noexcept {
    return cuda(cudaGraphLaunch(launchable_, stream), "CUDA graph");
  }

 private:
  cudaGraphExec_t launchable_ = nullptr;
};

}  // namespace freewheel

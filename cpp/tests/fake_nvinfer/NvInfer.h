// SPDX-License-Identifier: Apache-2.0
#pragma once

/// NOT TensorRT. Declarations of just what src/engine_tensorrt.cpp uses of TensorRT 10, written
/// from its public documentation, so that the file is compiled where TensorRT is not installed.
/// Nothing here can be linked or run, and layouts and virtual tables are not the real ones.

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 0
#define NV_TENSORRT_PATCH 0
#define NV_TENSORRT_BUILD 0

namespace nvinfer1 {

enum class TensorLocation : int32_t { kDEVICE = 0, kHOST = 1 };
enum class ExecutionContextAllocationStrategy : int32_t {
  kSTATIC = 0,
  kON_PROFILE_CHANGE = 1,
  kUSER_MANAGED = 2
};

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual ~ILogger() = default;
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  bool setInputShape(const char* name, const Dims& dims) noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  bool setTensorAddress(const char* name, void* data) noexcept;
  int32_t inferShapes(int32_t count, const char** names) noexcept;
  size_t updateDeviceMemorySizeForShapes() noexcept;
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept;
  TensorLocation getTensorLocation(const char* name) const noexcept;
};

class IRuntime {
 public:
  virtual ~IRuntime() = default;
  ICudaEngine* deserializeCudaEngine(const void* blob, size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// NOT TensorRT. Declarations of just what src/engine_tensorrt.cpp uses of TensorRT 10.15 and of
/// TensorRT-RTX 1.7, written from their public documentation, so that the file is compiled where
/// neither is installed. Layouts and virtual tables are not the real ones. What
/// feigned_tensorrt.cpp defines of them holds its callers to NVIDIA's protocol, and computes with
/// OpenVINO.

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

extern "C" {
int32_t getInferLibMajorVersion() noexcept;
int32_t getInferLibMinorVersion() noexcept;
int32_t getInferLibPatchVersion() noexcept;
int32_t getInferLibBuildVersion() noexcept;
}

namespace nvinfer1 {

enum class TensorLocation : int32_t { kDEVICE = 0, kHOST = 1 };
enum class ExecutionContextAllocationStrategy : int32_t {
  kSTATIC = 0,
  kON_PROFILE_CHANGE = 1,
  kUSER_MANAGED = 2
};

enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

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

class IHostMemory {
 public:
  virtual ~IHostMemory() = default;
  void* data() const noexcept;
  size_t size() const noexcept;
};

#ifdef FREEWHEEL_TENSORRT_RTX
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER, kNONE };

class IRuntimeCache {
 public:
  virtual ~IRuntimeCache() = default;
  IHostMemory* serialize() const noexcept;
  bool deserialize(const void* blob, size_t size) noexcept;
};

class IRuntimeConfig {
 public:
  virtual ~IRuntimeConfig() = default;
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept;
  void setDynamicShapesKernelSpecializationStrategy(
      DynamicShapesKernelSpecializationStrategy strategy) noexcept;
  IRuntimeCache* createRuntimeCache() const noexcept;
  bool setRuntimeCache(const IRuntimeCache& cache) noexcept;
};
#endif

class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  bool setInputShape(const char* name, const Dims& dims) noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  bool setTensorAddress(const char* name, void* data) noexcept;
  int32_t inferShapes(int32_t count, const char** names) noexcept;
  size_t updateDeviceMemorySizeForShapes() noexcept;
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept;
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
#ifdef FREEWHEEL_TENSORRT_RTX
  bool isStreamCapturable(cudaStream_t stream) const noexcept;
#endif
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept;
  TensorLocation getTensorLocation(const char* name) const noexcept;
  int32_t getNbOptimizationProfiles() const noexcept;
  Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector which) const noexcept;
#ifdef FREEWHEEL_TENSORRT_RTX
  IRuntimeConfig* createRuntimeConfig() noexcept;
  IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept;
#endif
};

class IRuntime {
 public:
  virtual ~IRuntime() = default;
  ICudaEngine* deserializeCudaEngine(const void* blob, size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

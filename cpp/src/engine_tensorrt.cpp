// SPDX-License-Identifier: Apache-2.0
/// TensorRT and TensorRT-RTX on one GPU and one stream. Written against the documented API of
/// TensorRT 10 and compiled against declarations of it; it has not been run for want of a GPU.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "backends.h"
#include "freewheel/files.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kPlan[] = "/model.plan";
constexpr char kRebuild[] = "rebuild the engines for this GPU with 'freewheel build'";

Status cuda(cudaError_t error, const char* what) noexcept {
  if (error == cudaSuccess) return {};
  return Status(Code::kFailed, what, cudaGetErrorString(error), "look at the GPU with nvidia-smi");
}

/// Device memory on one stream.
class CudaMemory final : public Memory {
 public:
  explicit CudaMemory(int device) : device_(device) {}
  ~CudaMemory() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status open() {
    FREEWHEEL_TRY(cuda(cudaSetDevice(device_), "GPU"));
    return cuda(cudaStreamCreate(&stream_), "CUDA stream");
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

 private:
  Status move(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind) noexcept {
    return cuda(cudaMemcpyAsync(target, source, bytes, kind, stream_), "GPU memory");
  }

  int device_;
  cudaStream_t stream_ = nullptr;
};

/// Memory for the activations of whichever engine runs: all run one after another on one stream. It
/// grows when an engine is bound, never when one runs.
class Scratch {
 public:
  explicit Scratch(CudaMemory& memory) : memory_(memory) {}

  Status reserve(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!buffer_.empty() && buffer_.view().bytes() >= bytes) return {};
    FREEWHEEL_TRY(memory_.synchronize());  // somebody may be using the smaller one
    buffer_ = Buffer();
    FREEWHEEL_ASSIGN(
        buffer_, Buffer::create(memory_, DType::kUint8, Shape{static_cast<std::int64_t>(bytes)}));
    return {};
  }
  void* data() const noexcept { return buffer_.view().data; }

  std::mutex mutex;

 private:
  CudaMemory& memory_;
  Buffer buffer_;
};

class Journal final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      last_ = message;
    } catch (...) {  // a message less, where memory is out
    }
  }
  std::string last() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_.empty() ? "TensorRT gives no reason" : last_;
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

/// What engines and calls keep of their backend.
struct Shared {
  explicit Shared(int device) : memory(device), scratch(memory) {}
  CudaMemory memory;
  Scratch scratch;
  Journal journal;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
};

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = shape.rank();
  for (int axis = 0; axis < shape.rank(); ++axis) dims.d[axis] = shape[axis];
  return dims;
}

class TensorRTCall final : public BoundCall {
 public:
  TensorRTCall(std::shared_ptr<Shared> shared, std::shared_ptr<void> engine, std::string name,
               std::unique_ptr<nvinfer1::IExecutionContext> context, std::size_t bytes)
      : shared_(std::move(shared)),
        engine_(std::move(engine)),
        name_(std::move(name)),
        context_(std::move(context)),
        bytes_(bytes) {}

  Status run() noexcept override {
    FREEWHEEL_TRY(shared_->memory.select());
    const std::lock_guard<std::mutex> lock(shared_->scratch.mutex);
    if (scratch_ != shared_->scratch.data()) {  // it grew when another call was bound
      scratch_ = shared_->scratch.data();
      context_->setDeviceMemoryV2(scratch_, static_cast<std::int64_t>(bytes_));
    }
    if (context_->enqueueV3(shared_->memory.stream())) return {};
    return Status(Code::kFailed, "engine '" + name_ + "'", shared_->journal.last(),
                  "look at the GPU with nvidia-smi");
  }

 private:
  std::shared_ptr<Shared> shared_;
  std::shared_ptr<void> engine_;  // outlives the context
  std::string name_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::size_t bytes_;
  void* scratch_ = nullptr;
};

class TensorRTEngine final : public Engine, public std::enable_shared_from_this<TensorRTEngine> {
 public:
  TensorRTEngine(std::string name, EngineRecord record, std::shared_ptr<Shared> shared,
                 std::unique_ptr<nvinfer1::ICudaEngine> plan)
      : Engine(std::move(name), std::move(record)),
        shared_(std::move(shared)),
        plan_(std::move(plan)) {}

 protected:
  Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) override {
    FREEWHEEL_TRY(shared_->memory.select());
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        plan_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context == nullptr) return fault("", shared_->journal.last());
    for (const auto& [name, io] : record().inputs) {
      const Tensor& tensor = bindings.at(name);
      if (plan_->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kHOST) {
        return fault(name, "is a shape tensor in host memory, which is not supported");
      }
      if (!context->setInputShape(name.c_str(), dims_of(tensor.shape))) {
        return fault(name, "shape " + tensor.shape.text() + " is outside the engine's profile");
      }
    }
    for (const auto& [name, tensor] : bindings) {
      if (!context->setTensorAddress(name.c_str(), tensor.data)) {
        return fault(name, shared_->journal.last());
      }
    }
    if (context->inferShapes(0, nullptr) != 0) return fault("", "shapes are not known");
    for (const auto& [name, io] : record().outputs) {
      const nvinfer1::Dims given = context->getTensorShape(name.c_str());
      Shape shape;
      for (int axis = 0; axis < given.nbDims; ++axis) shape.push_back(given.d[axis]);
      if (shape != bindings.at(name).shape) {
        return fault(name, "shape is " + bindings.at(name).shape.text() + " but the graph gives " +
                               shape.text());
      }
    }
    const std::size_t bytes = context->updateDeviceMemorySizeForShapes();
    FREEWHEEL_TRY(shared_->scratch.reserve(bytes));
    return std::unique_ptr<BoundCall>(std::make_unique<TensorRTCall>(
        shared_, shared_from_this(), name(), std::move(context), bytes));
  }

 private:
  Status fault(const std::string& tensor, const std::string& what) const {
    const std::string where = "engine '" + name() + "'";
    return Status(Code::kRequest, tensor.empty() ? where : where + ", tensor '" + tensor + "'",
                  what, "ask for a size inside the profile, or rebuild with a wider range");
  }

  std::shared_ptr<Shared> shared_;
  std::unique_ptr<nvinfer1::ICudaEngine> plan_;
};

class TensorRT final : public Backend {
 public:
  explicit TensorRT(int device) : shared_(std::make_shared<Shared>(device)), device_(device) {}

  Status open() {
    FREEWHEEL_TRY(shared_->memory.open());
    int major = 0, minor = 0;
    FREEWHEEL_TRY(
        cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "GPU"));
    FREEWHEEL_TRY(
        cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), "GPU"));
    machine_ = "sm" + std::to_string(major) + "." + std::to_string(minor);
    shared_->runtime.reset(nvinfer1::createInferRuntime(shared_->journal));
    if (shared_->runtime == nullptr) {
      return Status(Code::kBackend, std::string("backend '") + name() + "'",
                    shared_->journal.last(), "check the driver and the TensorRT libraries");
    }
    return {};
  }

  const char* name() const noexcept override { return FREEWHEEL_TENSORRT; }
  Memory& memory() noexcept override { return shared_->memory; }

  Result<std::shared_ptr<Engine>> load(const std::string& folder) override {
    FREEWHEEL_ASSIGN(EngineRecord record, EngineRecord::read(folder));
    FREEWHEEL_TRY(record.require(folder, name(), version(), record.machine));
    std::istringstream targets(record.machine);
    bool is_ours = false;
    for (std::string target; targets >> target;) is_ours = is_ours || target == machine_;
    if (!is_ours) {
      return Status(Code::kBundle, folder,
                    "compiled for " + record.machine + ", but the GPU here is " + machine_,
                    kRebuild);
    }
    FREEWHEEL_ASSIGN(const MappedFile plan, MappedFile::open(folder + kPlan));
    FREEWHEEL_TRY(shared_->memory.select());
    std::unique_ptr<nvinfer1::ICudaEngine> engine(
        shared_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine == nullptr) {
      return Status(Code::kBundle, folder + kPlan, shared_->journal.last(), kRebuild);
    }
    return std::shared_ptr<Engine>(
        std::make_shared<TensorRTEngine>(folder.substr(folder.find_last_of('/') + 1),
                                         std::move(record), shared_, std::move(engine)));
  }

  Result<std::shared_ptr<Engine>> compile(const std::string& onnx, const std::string&,
                                          const std::string&) override {
    return Status(Code::kBackend, onnx, "TensorRT engines are built by 'freewheel build' only",
                  kRebuild);
  }

 private:
  static std::string version() {
    return std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
           std::to_string(NV_TENSORRT_PATCH) + "." + std::to_string(NV_TENSORRT_BUILD);
  }

  std::shared_ptr<Shared> shared_;
  int device_;
  std::string machine_;
};

}  // namespace

Result<std::shared_ptr<Backend>> create_tensorrt(const BackendOptions& options) {
  auto backend = std::make_shared<TensorRT>(options.device);
  FREEWHEEL_TRY(backend->open());
  return std::shared_ptr<Backend>(std::move(backend));
}

}  // namespace freewheel

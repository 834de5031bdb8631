// SPDX-License-Identifier: Apache-2.0
/// TensorRT and TensorRT-RTX on one GPU and one stream. Written against the documented API of
/// TensorRT 10.15 and TensorRT-RTX 1.7, compiled against declarations of both, and run over a
/// feigned GPU (tests/feigned_gpu); TensorRT itself has not run it.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "backends.h"
#include "cuda_memory.h"
#include "freewheel/files.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kPlan[] = "/model.plan";
constexpr char kRebuild[] = "rebuild the engines for this GPU with 'freewheel build'";

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
      told_ += told_.empty() ? message : std::string("; ") + message;
    } catch (...) {  // a message less, where memory is out
    }
  }

  /// What was complained about since this was asked last.
  std::string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string told = std::exchange(told_, {});
    return told.empty() ? "TensorRT gives no reason" : told;
  }

 private:
  std::mutex mutex_;
  std::string told_;
};

/// What engines and calls keep of their backend.
struct Shared {
  explicit Shared(const BackendOptions& options)
      : memory(options.device), scratch(memory), cuda_graphs(options.cuda_graphs) {}
  CudaMemory memory;
  Scratch scratch;
  Journal journal;
  bool cuda_graphs;
  std::string gpu;  ///< Its name, as files have it.
  std::unique_ptr<nvinfer1::IRuntime> runtime;
#ifdef FREEWHEEL_TENSORRT_RTX
  std::unique_ptr<nvinfer1::IRuntimeCache> kernels;  ///< Compiled on this GPU, for every engine.
  std::string kernels_path;
#endif
};

/// Whether "sm8.9 sm12.0", or "sm8.0+" with every newer GPU, holds compute capability major.minor.
bool serves(const std::string& machine, int major, int minor) {
  std::istringstream targets(machine);
  for (std::string target; targets >> target;) {
    int known_major = 0, known_minor = 0, end = 0;
    if (std::sscanf(target.c_str(), "sm%d.%d%n", &known_major, &known_minor, &end) != 2) continue;
    const std::string rest = target.substr(static_cast<std::size_t>(end));
    const auto known = std::make_pair(known_major, known_minor);
    const auto here = std::make_pair(major, minor);
    if ((rest.empty() && known == here) || (rest == "+" && known <= here)) return true;
  }
  return false;
}

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
    const cudaStream_t stream = shared_->memory.stream();
    if (scratch_ != shared_->scratch.data()) {  // it grew when another call was bound
      scratch_ = shared_->scratch.data();
      context_->setDeviceMemoryV2(scratch_, static_cast<std::int64_t>(bytes_));
      graph_.reset();
      is_settled_ = false;
    }
    if (!shared_->cuda_graphs) return enqueue();
    if (!is_settled_) {  // the first enqueue may compile, load or allocate; none of it is captured
      FREEWHEEL_TRY(enqueue());
      is_settled_ = true;
      return {};
    }
    if (graph_.empty()) {
#ifdef FREEWHEEL_TENSORRT_RTX
      if (!context_->isStreamCapturable(stream)) {
        return Status(Code::kRequest, "engine '" + name_ + "'",
                      "can't be recorded into a CUDA graph", "leave cuda_graphs out");
      }
#endif
      FREEWHEEL_TRY(graph_.record(stream, [&] { return enqueue(); }));
    }
    return graph_.launch(stream);
  }

 private:
  Status enqueue() noexcept {
    if (context_->enqueueV3(shared_->memory.stream())) return {};
    return Status(Code::kFailed, "engine '" + name_ + "'", shared_->journal.take(),
                  "look at the GPU with nvidia-smi");
  }

  std::shared_ptr<Shared> shared_;
  std::shared_ptr<void> engine_;  // outlives the context
  std::string name_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::size_t bytes_;
  void* scratch_ = nullptr;
  Graph graph_;
  bool is_settled_ = false;
};

class TensorRTEngine final : public Engine, public std::enable_shared_from_this<TensorRTEngine> {
 public:
  TensorRTEngine(std::string name, EngineRecord record, std::shared_ptr<Shared> shared,
                 std::unique_ptr<nvinfer1::ICudaEngine> plan)
      : Engine(std::move(name), std::move(record)),
        shared_(std::move(shared)),
        plan_(std::move(plan)) {}

#ifdef FREEWHEEL_TENSORRT_RTX
  /// Settles what contexts are made with. Engines are loaded one after another, so that the first
  /// makes the cache of kernels for all.
  Status configure() {
    config_.reset(plan_->createRuntimeConfig());
    if (config_ == nullptr) return fault("", shared_->journal.take());
    config_->setExecutionContextAllocationStrategy(
        nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    if (shared_->cuda_graphs) {  // else a slower kernel stands in while the right one is compiled
      config_->setDynamicShapesKernelSpecializationStrategy(
          nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    }
    if (shared_->kernels == nullptr) {
      shared_->kernels.reset(config_->createRuntimeCache());
      // Kernels of another GPU or version are refused, and compiled anew.
      if (auto kept = MappedFile::open(shared_->kernels_path); shared_->kernels && kept.ok()) {
        (void)shared_->kernels->deserialize(kept->data(), kept->size());
      }
    }
    if (shared_->kernels != nullptr) config_->setRuntimeCache(*shared_->kernels);
    return {};
  }
#endif

 protected:
  Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) override {
    FREEWHEEL_TRY(shared_->memory.select());
    FREEWHEEL_ASSIGN(std::unique_ptr<nvinfer1::IExecutionContext> context, create_context());
    const std::int32_t profile = profile_for(bindings);
    if (profile > 0 && !context->setOptimizationProfileAsync(profile, shared_->memory.stream())) {
      return fault("", shared_->journal.take());
    }
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
      if (reinterpret_cast<std::uintptr_t>(tensor.data) % kAlignment != 0) {
        return fault(name, "is not at a multiple of " + std::to_string(kAlignment) + " bytes");
      }
      if (!context->setTensorAddress(name.c_str(), tensor.data)) {
        return fault(name, shared_->journal.take());
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
  /// A context whose activations lie in the shared scratch memory.
  Result<std::unique_ptr<nvinfer1::IExecutionContext>> create_context() {
#ifdef FREEWHEEL_TENSORRT_RTX
    nvinfer1::IRuntimeConfig* const how = config_.get();
#else
    constexpr auto how = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#endif
    std::unique_ptr<nvinfer1::IExecutionContext> context(plan_->createExecutionContext(how));
    if (context == nullptr) return fault("", shared_->journal.take());
    return context;
  }

  /// The last optimization profile that fits, the narrowest; 0 where none does.
  std::int32_t profile_for(const Tensors& bindings) const {
    for (std::int32_t profile = plan_->getNbOptimizationProfiles() - 1; profile > 0; --profile) {
      bool fits = true;
      for (const auto& [name, io] : record().inputs) {
        const Shape& shape = bindings.at(name).shape;
        const auto limit = [&](nvinfer1::OptProfileSelector which) {
          return plan_->getProfileShape(name.c_str(), profile, which);
        };
        const nvinfer1::Dims least = limit(nvinfer1::OptProfileSelector::kMIN);
        const nvinfer1::Dims most = limit(nvinfer1::OptProfileSelector::kMAX);
        for (int axis = 0; axis < shape.rank(); ++axis) {
          fits = fits && least.d[axis] <= shape[axis] && shape[axis] <= most.d[axis];
        }
      }
      if (fits) return profile;
    }
    return 0;
  }

  Status fault(const std::string& tensor, const std::string& what) const {
    const std::string where = "engine '" + name() + "'";
    return Status(Code::kRequest, tensor.empty() ? where : where + ", tensor '" + tensor + "'",
                  what, "ask for a size inside the profile, or rebuild with a wider range");
  }

  std::shared_ptr<Shared> shared_;
  std::unique_ptr<nvinfer1::ICudaEngine> plan_;
#ifdef FREEWHEEL_TENSORRT_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
#endif
};

class TensorRT final : public Backend {
 public:
  explicit TensorRT(const BackendOptions& options)
      : shared_(std::make_shared<Shared>(options)), device_(options.device) {}
#ifdef FREEWHEEL_TENSORRT_RTX
  ~TensorRT() override { keep_kernels(); }
#endif

  Status open() {
    FREEWHEEL_TRY(shared_->memory.open());
    FREEWHEEL_TRY(
        cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device_), "GPU"));
    FREEWHEEL_TRY(
        cuda(cudaDeviceGetAttribute(&minor_, cudaDevAttrComputeCapabilityMinor, device_), "GPU"));
    cudaDeviceProp properties{};
    FREEWHEEL_TRY(cuda(cudaGetDeviceProperties(&properties, device_), "GPU"));
    shared_->gpu = file_name(properties.name);
    shared_->runtime.reset(nvinfer1::createInferRuntime(shared_->journal));
    if (shared_->runtime == nullptr) {
      return Status(Code::kBackend, std::string("backend '") + name() + "'",
                    shared_->journal.take(), "check the driver and the TensorRT libraries");
    }
    return {};
  }

  const char* name() const noexcept override { return FREEWHEEL_TENSORRT; }
  Memory& memory() noexcept override { return shared_->memory; }

  Result<std::shared_ptr<Engine>> load(const std::string& folder) override {
    FREEWHEEL_ASSIGN(EngineRecord record, EngineRecord::read(folder));
    FREEWHEEL_TRY(record.require(folder, name(), version(), record.machine));
    if (!serves(record.machine, major_, minor_)) {
      return Status(Code::kBundle, folder,
                    "compiled for " + record.machine + ", but the GPU here is sm" +
                        std::to_string(major_) + "." + std::to_string(minor_),
                    kRebuild);
    }
#ifdef FREEWHEEL_TENSORRT_RTX
    if (shared_->kernels_path.empty()) {  // BUNDLE/engines/SET/GRAPH: beside the bundle, as Python
      const std::filesystem::path bundle = std::filesystem::absolute(folder).parent_path();
      const std::filesystem::path beside = bundle.parent_path().parent_path().parent_path();
      shared_->kernels_path = (beside / "freewheel-cache" /
                               ("tensorrt_rtx-" + version() + "-" + shared_->gpu + ".runtime"))
                                  .string();
    }
#endif
    FREEWHEEL_ASSIGN(const MappedFile plan, MappedFile::open(folder + kPlan));
    FREEWHEEL_TRY(shared_->memory.select());
    std::unique_ptr<nvinfer1::ICudaEngine> engine(
        shared_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine == nullptr) {
      return Status(Code::kBundle, folder + kPlan, shared_->journal.take(), kRebuild);
    }
    auto loaded = std::make_shared<TensorRTEngine>(folder.substr(folder.find_last_of('/') + 1),
                                                   std::move(record), shared_, std::move(engine));
#ifdef FREEWHEEL_TENSORRT_RTX
    FREEWHEEL_TRY(loaded->configure());
#endif
    return std::shared_ptr<Engine>(std::move(loaded));
  }

  Result<std::shared_ptr<Engine>> compile(const std::string& onnx, const std::string&,
                                          const std::string&) override {
    return Status(Code::kBackend, onnx, "TensorRT engines are built by 'freewheel build' only",
                  kRebuild);
  }

 private:
  /// Of the library that runs, which need not be that of the headers.
  static std::string version() {
    return std::to_string(getInferLibMajorVersion()) + "." +
           std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." +
           std::to_string(getInferLibBuildVersion());
  }

  /// Replaces what a file name had better not hold, as the Python backend does.
  static std::string file_name(const char* text) {
    std::string name;
    for (; *text != '\0'; ++text) {
      const bool is_plain = std::isalnum(static_cast<unsigned char>(*text)) != 0 || *text == '.';
      if (is_plain) name += *text;
      if (!is_plain && (name.empty() || name.back() != '-')) name += '-';
    }
    return name;
  }

#ifdef FREEWHEEL_TENSORRT_RTX
  /// Keeps compiled kernels for the next process; it saves time and may fail.
  void keep_kernels() noexcept try {
    if (shared_->kernels == nullptr || shared_->kernels_path.empty()) return;
    const std::unique_ptr<nvinfer1::IHostMemory> content(shared_->kernels->serialize());
    if (content == nullptr) return;
    const std::filesystem::path path(shared_->kernels_path);
    if (auto kept = MappedFile::open(path.string());
        kept.ok() && kept->size() == content->size() &&
        std::memcmp(kept->data(), content->data(), content->size()) == 0) {
      return;
    }
    std::error_code fault;
    std::filesystem::create_directories(path.parent_path(), fault);
    const std::string partial = path.string() + ".partial";
    if (write_bytes(partial, content->data(), content->size()).ok()) {
      std::filesystem::rename(partial, path, fault);
    }
  } catch (...) {
  }
#endif

  std::shared_ptr<Shared> shared_;
  int device_;
  int major_ = 0, minor_ = 0;  ///< Of its compute capability.
};

}  // namespace

Result<std::shared_ptr<Backend>> create_tensorrt(const BackendOptions& options) {
  auto backend = std::make_shared<TensorRT>(options);
  FREEWHEEL_TRY(backend->open());
  return std::shared_ptr<Backend>(std::move(backend));
}

}  // namespace freewheel

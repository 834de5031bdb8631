// SPDX-License-Identifier: Apache-2.0
/// A stand-in for TensorRT that computes with OpenVINO, over plans of tests/rig/stand_in.py. It
/// holds its caller to NVIDIA's protocol: shapes before addresses are used, aligned addresses in
/// allocated memory, as much scratch memory as announced; and fills that memory with rubbish at
/// every enqueue.

#include <chrono>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>
#include <optional>
#include <set>
#include <string>

#include "NvInfer.h"
#include "feigned_gpu.h"

namespace nvinfer1 {
namespace {

constexpr char kMagic[] = "stand-in plan\n";
constexpr std::size_t kAlignment = 256;
#ifdef FREEWHEEL_TENSORRT_RTX
constexpr std::int32_t kVersion[] = {1, 7, 1, 116};
#else
constexpr std::int32_t kVersion[] = {11, 4, 0, 106};
#endif

ov::Shape shape_of(const Dims& dims) { return ov::Shape(dims.d, dims.d + dims.nbDims); }

Dims dims_of(const std::vector<std::size_t>& shape) {
  Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    dims.d[axis] = static_cast<std::int64_t>(shape[axis]);
  }
  return dims;
}

#ifdef FREEWHEEL_TENSORRT_RTX
class Content final : public IHostMemory {
 public:
  explicit Content(std::string text) : bytes(std::move(text)) {}
  std::string bytes;
};

/// Names of compiled kernels below the time at which the first cache of the file was made: the text
/// tells whether a process went on with the kernels of another.
class Cache final : public IRuntimeCache {
 public:
  std::string text() const {
    nlohmann::json content = {{"made", made_}, {"kernels", kernels}};
    return std::string(kMagic) + content.dump();
  }
  bool read(const std::string& content) {
    if (content.rfind(kMagic, 0) != 0) return false;
    const nlohmann::json found = nlohmann::json::parse(content.substr(sizeof kMagic - 1));
    made_ = found.at("made").get<std::int64_t>();
    kernels = found.at("kernels").get<std::set<std::string>>();
    return true;
  }

  std::set<std::string> kernels;

 private:
  std::int64_t made_ = std::chrono::system_clock::now().time_since_epoch().count();
};

class Config final : public IRuntimeConfig {
 public:
  ~Config() override { *is_alive = false; }

  ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC;
  DynamicShapesKernelSpecializationStrategy kernels =
      DynamicShapesKernelSpecializationStrategy::kLAZY;
  Cache* cache = nullptr;
  std::shared_ptr<bool> is_alive = std::make_shared<bool>(true);
};
#endif

class Engine;

class Context final : public IExecutionContext {
 public:
  Context(const Engine& engine, ILogger& logger);

#ifdef FREEWHEEL_TENSORRT_RTX
  Context(const Engine& engine, ILogger& logger, const Config& config) : Context(engine, logger) {
    config_ = &config;
    is_configured_ = config.is_alive;
  }
  bool is_capturable(cudaStream_t stream) const;
#endif

  bool set_shape(const std::string& name, const Dims& dims);
  std::optional<ov::Shape> shape(const std::string& name) const;
  bool set_address(const std::string& name, void* data);
  std::size_t scratch_bytes() const;
  void set_scratch(void* memory, std::int64_t bytes);
  bool enqueue(cudaStream_t stream);
  bool infer();

  std::int32_t profile = 0;

 private:
  bool fault(const std::string& what) const {
    logger_.log(ILogger::Severity::kERROR, what.c_str());
    return false;
  }

  const Engine& engine_;
  ILogger& logger_;
  std::map<std::string, ov::Shape> shapes_;  // of inputs; of outputs once inferred
  std::map<std::string, void*> addresses_;
  void* scratch_ = nullptr;
  std::size_t scratch_size_ = 0;
  ov::InferRequest request_;
#ifdef FREEWHEEL_TENSORRT_RTX
  const Config* config_ = nullptr;
  std::shared_ptr<bool> is_configured_;
#endif
};

class Engine final : public ICudaEngine {
 public:
  Engine(const std::string& plan, ILogger& journal)
      : logger(journal), digest(std::to_string(std::hash<std::string>()(plan))) {
    const std::size_t head = plan.find('\n', sizeof kMagic - 1);
    about = nlohmann::json::parse(plan.substr(sizeof kMagic - 1, head - (sizeof kMagic - 1)));
    model = core().read_model(plan.substr(head + 1), ov::Tensor());
    compiled = core().compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32),
                                    ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                    ov::inference_num_threads(1));
  }

  std::vector<std::size_t> profile_shape(const std::string& name, std::int32_t profile,
                                         OptProfileSelector which) const {
    const auto& profiles = about.at("profiles");
    const auto index = static_cast<std::size_t>(profile);
    if (index < profiles.size() && profiles[index].contains(name)) {
      return profiles[index][name][static_cast<std::size_t>(which)].get<std::vector<std::size_t>>();
    }
    return model->input(name).get_shape();
  }

  ILogger& logger;
  std::string digest;
  nlohmann::json about;
  std::shared_ptr<ov::Model> model;
  ov::CompiledModel compiled;

 private:
  static ov::Core& core() {
    static ov::Core one;
    return one;
  }
};

Context::Context(const Engine& engine, ILogger& logger)
    : engine_(engine),
      logger_(logger),
      request_(ov::CompiledModel(engine.compiled).create_infer_request()) {}

bool Context::set_shape(const std::string& name, const Dims& dims) {
  const auto least = engine_.profile_shape(name, profile, OptProfileSelector::kMIN);
  const auto most = engine_.profile_shape(name, profile, OptProfileSelector::kMAX);
  const ov::Shape shape = shape_of(dims);
  bool fits = shape.size() == least.size();
  for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
    fits = least[axis] <= shape[axis] && shape[axis] <= most[axis];
  }
  if (!fits) return fault("shape of '" + name + "' is outside the profile");
  shapes_[name] = shape;
  return true;
}

std::optional<ov::Shape> Context::shape(const std::string& name) const {
  const auto known = shapes_.find(name);
  return known == shapes_.end() ? std::nullopt : std::optional<ov::Shape>(known->second);
}

bool Context::infer() {
  const std::shared_ptr<ov::Model> at = engine_.model->clone();
  std::map<std::string, ov::PartialShape> given;
  for (const auto& input : at->inputs()) {
    const auto known = shapes_.find(input.get_any_name());
    if (known == shapes_.end()) return fault("no shape of '" + input.get_any_name() + "'");
    given[known->first] = known->second;
  }
  at->reshape(given);
  for (const auto& output : at->outputs()) shapes_[output.get_any_name()] = output.get_shape();
  return true;
}

bool Context::set_address(const std::string& name, void* data) {
  if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
    return fault("address of '" + name + "' is not aligned");
  }
  addresses_[name] = data;
  return true;
}

std::size_t Context::scratch_bytes() const {
  std::size_t elements = 0;
  for (const auto& [name, shape] : shapes_) elements += ov::shape_size(shape);
  return (4 * elements + kAlignment - 1) / kAlignment * kAlignment;
}

void Context::set_scratch(void* memory, std::int64_t bytes) {
  scratch_ = memory;
  scratch_size_ = static_cast<std::size_t>(bytes);
}

#ifdef FREEWHEEL_TENSORRT_RTX
bool Context::is_capturable(cudaStream_t stream) const {
  const auto& flags = engine_.about.at("flags");
  const bool is_ours =
      std::find(flags.begin(), flags.end(), "REQUIRE_USER_ALLOCATION") != flags.end();
  return stream != nullptr && is_ours;
}
#endif

bool Context::enqueue(cudaStream_t stream) {
#ifdef FREEWHEEL_TENSORRT_RTX
  if (!*is_configured_) return fault("the configuration of the context is gone");
  const bool is_eager = config_->kernels == DynamicShapesKernelSpecializationStrategy::kEAGER;
  if (config_->cache != nullptr) {
    config_->cache->kernels.insert(engine_.digest + (is_eager ? " eager" : " lazy"));
  }
#endif
  const std::size_t needed = scratch_bytes();
  if (scratch_size_ < needed || !feigned::is_allocated(scratch_, needed)) {
    return fault("the scratch memory is too small");
  }
  std::vector<std::pair<std::string, ov::Tensor>> bound;
  const auto bind = [&](const std::string& name, const ov::element::Type& type) {
    const auto shape = shapes_.find(name);
    const auto address = addresses_.find(name);
    if (shape == shapes_.end()) return fault("no shape of '" + name + "'");
    if (address == addresses_.end()) return fault("no address of '" + name + "'");
    ov::Tensor tensor(type, shape->second, address->second);
    if (!feigned::is_allocated(address->second, tensor.get_byte_size())) {
      return fault("'" + name + "' is not in the GPU's memory");
    }
    bound.emplace_back(name, std::move(tensor));
    return true;
  };
  for (const auto& input : engine_.model->inputs()) {
    if (!bind(input.get_any_name(), input.get_element_type())) return false;
  }
  for (const auto& output : engine_.model->outputs()) {
    if (!bind(output.get_any_name(), output.get_element_type())) return false;
  }
  return feigned::push(stream, [this, needed, scratch = scratch_, bound] {
           std::memset(scratch, 0xFF, needed);
           for (const auto& [name, tensor] : bound) request_.set_tensor(name, tensor);
           request_.infer();
         }) == cudaSuccess;
}

class Runtime final : public IRuntime {
 public:
  explicit Runtime(ILogger& journal) : logger(journal) {}
  ILogger& logger;
};

Context& own(IExecutionContext* context) { return static_cast<Context&>(*context); }
const Context& own(const IExecutionContext* context) {
  return static_cast<const Context&>(*context);
}
const Engine& own(const ICudaEngine* engine) { return static_cast<const Engine&>(*engine); }

}  // namespace

IRuntime* createInferRuntime(ILogger& logger) noexcept { return new Runtime(logger); }

ICudaEngine* IRuntime::deserializeCudaEngine(const void* blob, size_t size) noexcept {
  ILogger& logger = static_cast<Runtime*>(this)->logger;
  const std::string plan(static_cast<const char*>(blob), size);
  try {
    if (plan.rfind(kMagic, 0) == 0) return new Engine(plan, logger);
    logger.log(ILogger::Severity::kERROR, "Serialization assertion magic == expected failed.");
  } catch (const std::exception& fault) {
    logger.log(ILogger::Severity::kERROR, fault.what());
  }
  return nullptr;
}

IExecutionContext* ICudaEngine::createExecutionContext(
    ExecutionContextAllocationStrategy strategy) noexcept {
  if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) return nullptr;
  return new Context(own(this), own(this).logger);
}

#ifdef FREEWHEEL_TENSORRT_RTX
IRuntimeConfig* ICudaEngine::createRuntimeConfig() noexcept { return new Config(); }

IExecutionContext* ICudaEngine::createExecutionContext(IRuntimeConfig* config) noexcept {
  const Config& given = *static_cast<Config*>(config);
  if (given.strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) return nullptr;
  return new Context(own(this), own(this).logger, given);
}

void IRuntimeConfig::setExecutionContextAllocationStrategy(
    ExecutionContextAllocationStrategy strategy) noexcept {
  static_cast<Config*>(this)->strategy = strategy;
}

void IRuntimeConfig::setDynamicShapesKernelSpecializationStrategy(
    DynamicShapesKernelSpecializationStrategy strategy) noexcept {
  static_cast<Config*>(this)->kernels = strategy;
}

IRuntimeCache* IRuntimeConfig::createRuntimeCache() const noexcept { return new Cache(); }

bool IRuntimeConfig::setRuntimeCache(const IRuntimeCache& cache) noexcept {
  static_cast<Config*>(this)->cache = &const_cast<Cache&>(static_cast<const Cache&>(cache));
  return true;
}

IHostMemory* IRuntimeCache::serialize() const noexcept {
  return new Content(static_cast<const Cache*>(this)->text());
}

bool IRuntimeCache::deserialize(const void* blob, size_t size) noexcept {
  return static_cast<Cache*>(this)->read(std::string(static_cast<const char*>(blob), size));
}

void* IHostMemory::data() const noexcept {
  return const_cast<char*>(static_cast<const Content*>(this)->bytes.data());
}

size_t IHostMemory::size() const noexcept {
  return static_cast<const Content*>(this)->bytes.size();
}

bool IExecutionContext::isStreamCapturable(cudaStream_t stream) const noexcept {
  return own(this).is_capturable(stream);
}
#endif

TensorLocation ICudaEngine::getTensorLocation(const char* name) const noexcept {
  for (const auto& host : own(this).about.at("host")) {
    if (host == name) return TensorLocation::kHOST;
  }
  return TensorLocation::kDEVICE;
}

std::int32_t ICudaEngine::getNbOptimizationProfiles() const noexcept {
  return std::max<std::int32_t>(1,
                                static_cast<std::int32_t>(own(this).about.at("profiles").size()));
}

Dims ICudaEngine::getProfileShape(const char* name, std::int32_t profile,
                                  OptProfileSelector which) const noexcept {
  return dims_of(own(this).profile_shape(name, profile, which));
}

bool IExecutionContext::setInputShape(const char* name, const Dims& dims) noexcept {
  return own(this).set_shape(name, dims);
}

Dims IExecutionContext::getTensorShape(const char* name) const noexcept {
  const auto shape = own(this).shape(name);
  return shape ? dims_of(*shape) : Dims{-1, {}};
}

bool IExecutionContext::setTensorAddress(const char* name, void* data) noexcept {
  return own(this).set_address(name, data);
}

std::int32_t IExecutionContext::inferShapes(std::int32_t, const char**) noexcept {
  return own(this).infer() ? 0 : 1;
}

size_t IExecutionContext::updateDeviceMemorySizeForShapes() noexcept {
  return own(this).scratch_bytes();
}

void IExecutionContext::setDeviceMemoryV2(void* memory, std::int64_t size) noexcept {
  own(this).set_scratch(memory, size);
}

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept {
  own(this).profile = profile;
  return true;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  return own(this).enqueue(stream);
}

}  // namespace nvinfer1

extern "C" {
std::int32_t getInferLibMajorVersion() noexcept { return nvinfer1::kVersion[0]; }
std::int32_t getInferLibMinorVersion() noexcept { return nvinfer1::kVersion[1]; }
std::int32_t getInferLibPatchVersion() noexcept { return nvinfer1::kVersion[2]; }
std::int32_t getInferLibBuildVersion() noexcept { return nvinfer1::kVersion[3]; }
}

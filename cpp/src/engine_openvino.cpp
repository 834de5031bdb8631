// SPDX-License-Identifier: Apache-2.0
/// OpenVINO on the CPU, over the blobs that `freewheel build` compiled.

#include <sys/utsname.h>

#include <algorithm>
#include <openvino/openvino.hpp>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "backends.h"
#include "cpu_precision.h"
#include "freewheel/files.h"
#include "openvino_fault.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kBlob[] = "/model.blob";
constexpr char kDevice[] = "CPU";

ov::element::Type element_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ov::element::f32;
    case DType::kFloat64:
      return ov::element::f64;
    case DType::kFloat16:
      return ov::element::f16;
    case DType::kBfloat16:
      return ov::element::bf16;
    case DType::kInt64:
      return ov::element::i64;
    case DType::kInt32:
      return ov::element::i32;
    case DType::kBool:
      return ov::element::boolean;
    case DType::kUint8:
      return ov::element::u8;
    case DType::kFloat8E4m3fn:
      return ov::element::f8e4m3;
  }
  return ov::element::dynamic;
}

Result<ov::element::Type> precision_type(const std::string& precision, const std::string& where) {
  if (precision == "float32") return ov::element::f32;
  if (precision == "bfloat16") return ov::element::bf16;
  if (precision == "float16") return ov::element::f16;
  return Status(Code::kBundle, where,
                "is '" + precision + "', not one of float32, bfloat16, float16",
                "rebuild the engines on this machine with 'freewheel build'");
}

ov::Shape ov_shape(const Shape& shape) { return ov::Shape(shape.begin(), shape.end()); }

/// An infer request over caller memory.
class OpenVinoCall final : public BoundCall {
 public:
  OpenVinoCall(ov::InferRequest request, std::shared_ptr<void> engine, std::string name,
               std::vector<std::pair<std::string, Tensor>> outputs)
      : engine_(std::move(engine)),
        request_(std::move(request)),
        name_(std::move(name)),
        outputs_(std::move(outputs)) {}

  Status run() noexcept override {
    try {
      request_.infer();
      return is_checked_ ? Status() : check_outputs();
    } catch (const std::exception& fault) {
      return Status(Code::kFailed, "engine '" + name_ + "'", fault_text(fault),
                    "bind outputs of the shapes that the inputs imply");
    }
  }

 private:
  /// Makes sure OpenVINO kept the bound outputs: it may resize or replace one silently.
  Status check_outputs() {
    for (const auto& [name, tensor] : outputs_) {
      const ov::Tensor written = request_.get_tensor(name);
      if (written.get_shape() != ov_shape(tensor.shape) || written.data() != tensor.data) {
        return Status(Code::kRequest, "engine '" + name_ + "', tensor '" + name + "'",
                      "shape is " + tensor.shape.text() + " but the graph gives another",
                      "bind a tensor of the shape that the inputs imply");
      }
    }
    is_checked_ = true;
    return {};
  }

  std::shared_ptr<void> engine_;  // outlives the request
  ov::InferRequest request_;
  std::string name_;
  std::vector<std::pair<std::string, Tensor>> outputs_;
  bool is_checked_ = false;
};

class OpenVinoEngine final : public Engine, public std::enable_shared_from_this<OpenVinoEngine> {
 public:
  OpenVinoEngine(std::string name, EngineRecord record, MappedFile blob, ov::CompiledModel model)
      : Engine(std::move(name), std::move(record)),
        blob_(std::move(blob)),
        model_(std::move(model)) {}

 protected:
  Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) override {
    try {
      ov::InferRequest request = model_.create_infer_request();
      for (const auto& [key, tensor] : bindings) {
        request.set_tensor(
            key, ov::Tensor(element_type(tensor.dtype), ov_shape(tensor.shape), tensor.data));
      }
      std::vector<std::pair<std::string, Tensor>> outputs;
      for (const auto& [key, io] : record().outputs) outputs.emplace_back(key, bindings.at(key));
      return std::unique_ptr<BoundCall>(std::make_unique<OpenVinoCall>(
          std::move(request), shared_from_this(), name(), std::move(outputs)));
    } catch (const std::exception& fault) {
      return Status(Code::kRequest, "engine '" + name() + "'", fault_text(fault),
                    "bind tensors of the shapes that the graph declares");
    }
  }

 private:
  MappedFile blob_;  // the model's constants lie in it
  ov::CompiledModel model_;
};

/// Names the precisions that decide how a model is compiled, as bundle.md says; OpenVINO checks
/// the rest.
std::string machine_of(const std::vector<std::string>& capabilities) {
  struct utsname system {};
  ::uname(&system);
  std::string machine = system.machine;
  for (const std::string& capability : capabilities) machine += " " + capability;
  return machine;
}

class OpenVino final : public Backend {
 public:
  explicit OpenVino(const BackendOptions& options)
      : threads_(options.threads > 0
                     ? options.threads
                     : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))),
        streams_(std::max(1, options.streams)),
        capabilities_(core_.get_property(kDevice, ov::device::capabilities)) {
    std::sort(capabilities_.begin(), capabilities_.end());
    machine_ = machine_of(capabilities_);
    version_ = ov::get_openvino_version().buildNumber;
    version_ = version_.substr(0, version_.find('-'));
  }

  const char* name() const noexcept override { return "openvino"; }
  Memory& memory() noexcept override { return host_memory(); }

  Result<std::shared_ptr<Engine>> load(const std::string& folder) override {
    FREEWHEEL_ASSIGN(EngineRecord record, EngineRecord::read(folder));
    FREEWHEEL_TRY(record.require(folder, name(), version_, machine_));
    FREEWHEEL_ASSIGN(
        const ov::element::Type hint,
        precision_type(record.computed_in, folder + "/engine.json, 'details.computed_in'"));
    FREEWHEEL_ASSIGN(MappedFile blob, MappedFile::open(folder + kBlob));
    try {
      const ov::Tensor bytes(ov::element::u8, ov::Shape{blob.size()}, blob.data());
      ov::CompiledModel model = core_.import_model(bytes, kDevice, properties(hint));
      const std::string label = folder.substr(folder.find_last_of('/') + 1);
      return std::shared_ptr<Engine>(std::make_shared<OpenVinoEngine>(
          label, std::move(record), std::move(blob), std::move(model)));
    } catch (const std::exception& fault) {
      return Status(Code::kBundle, folder + kBlob, "OpenVINO refuses it: " + fault_text(fault),
                    "rebuild the engines on this machine with 'freewheel build'");
    }
  }

  Result<std::shared_ptr<Engine>> compile(const std::string& onnx, const std::string& graph_name,
                                          const std::string& precision) override {
    FREEWHEEL_ASSIGN(const ov::element::Type hint,
                     precision_type(computed_in(precision, capabilities_), onnx));
    try {
      const std::shared_ptr<ov::Model> read = core_.read_model(onnx);
      for (const auto& node : read->get_ops()) {
        // OpenVINO would multiply by the reciprocal, which differs in the last digit.
        const bool is_by_constant =
            node->get_type_name() == std::string_view("Divide") &&
            node->get_input_node_ptr(1)->get_type_name() == std::string_view("Constant");
        if (is_by_constant) node->get_rt_info()["nonconvertable_divide_0"] = true;
      }
      ov::CompiledModel model = core_.compile_model(read, kDevice, properties(hint));
      EngineRecord record;
      record.backend = name();
      record.version = version_;
      record.machine = machine_;
      record.precision = precision;
      record.computed_in = computed_in(precision, capabilities_);
      FREEWHEEL_TRY(describe(model.inputs(), graph_name, record.inputs));
      FREEWHEEL_TRY(describe(model.outputs(), graph_name, record.outputs));
      return std::shared_ptr<Engine>(std::make_shared<OpenVinoEngine>(
          graph_name, std::move(record), MappedFile(), std::move(model)));
    } catch (const std::exception& fault) {
      return Status(Code::kFailed, onnx, "OpenVINO refuses it: " + fault_text(fault),
                    "build the bundle on this machine");
    }
  }

 private:
  ov::AnyMap properties(const ov::element::Type& hint) const {
    return {
        ov::hint::inference_precision(hint),
        ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
        // Requests of one session run one after another, those of several need a stream each.
        ov::num_streams(streams_), ov::inference_num_threads(threads_ * streams_),
        ov::hint::dynamic_quantization_group_size(0),  // never int8 behind the caller's back
    };
  }

  static Status describe(const std::vector<ov::Output<const ov::Node>>& ports,
                         const std::string& graph, std::map<std::string, Io>& found) {
    for (const auto& port : ports) {
      const std::string name = port.get_any_name();
      Io& io = found[name];
      bool is_known = false;
      for (int index = 0; index <= static_cast<int>(DType::kFloat8E4m3fn); ++index) {
        const auto dtype = static_cast<DType>(index);
        if (element_type(dtype) == port.get_element_type()) io.dtype = dtype, is_known = true;
      }
      if (!is_known) {
        return Status(Code::kFailed, "graph '" + graph + "', tensor '" + name + "'",
                      "has an element type that engines don't pass", "cast it inside the graph");
      }
      int axis = 0;
      for (const ov::Dimension& size : port.get_partial_shape()) {
        if (size.is_static()) {
          io.shape.emplace_back(static_cast<std::int64_t>(size.get_length()));
        } else {
          io.shape.emplace_back(name + "." + std::to_string(axis));
        }
        ++axis;
      }
    }
    return {};
  }

  ov::Core core_;
  int threads_, streams_;
  std::vector<std::string> capabilities_;
  std::string machine_, version_;
};

}  // namespace

Result<std::shared_ptr<Backend>> create_openvino(const BackendOptions& options) {
  const char* stray = options.cuda_graphs   ? "cuda_graphs"
                      : options.device != 0 ? "device"
                                            : nullptr;
  if (stray != nullptr) {
    return Status(Code::kRequest, stray, "is for GPUs, and means nothing to openvino",
                  "leave it out");
  }
  try {
    return std::shared_ptr<Backend>(std::make_shared<OpenVino>(options));
  } catch (const std::exception& fault) {
    return Status(Code::kBackend, "backend 'openvino'", fault_text(fault),
                  "install OpenVINO where this library was built for it");
  }
}

}  // namespace freewheel

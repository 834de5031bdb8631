// SPDX-License-Identifier: Apache-2.0
#include "freewheel/engine.h"

#include "backends.h"
#include "try.h"

namespace freewheel {
namespace {

/// Backends compiled in, in the order in which they are preferred. The null row ends the table, so
/// that a build with none of them compiles.
constexpr BackendRow kBackends[] = {
#ifdef FREEWHEEL_TENSORRT
    {FREEWHEEL_TENSORRT, create_tensorrt},
#endif
#ifdef FREEWHEEL_OPENVINO
    {"openvino", create_openvino},
#endif
    {{}, nullptr},
};

Status check_tensor(const Tensor& tensor, const Io& io, const std::string& where, Dims& sizes) {
  if (tensor.dtype != io.dtype) {
    return Status(Code::kRequest, where,
                  std::string("dtype is ") + dtype_name(tensor.dtype) + " but the graph declares " +
                      dtype_name(io.dtype),
                  std::string("convert it to ") + dtype_name(io.dtype));
  }
  bool fits = tensor.data != nullptr && tensor.shape.rank() == static_cast<int>(io.shape.size());
  for (int axis = 0; fits && axis < tensor.shape.rank(); ++axis) {
    const Io::Dim& dim = io.shape[static_cast<std::size_t>(axis)];
    const std::int64_t size = tensor.shape[axis];
    if (const std::string* name = std::get_if<std::string>(&dim)) {
      const auto [known, is_new] = sizes.emplace(*name, size);
      if (known->second != size) {
        return Status(Code::kRequest, where,
                      "'" + *name + "' is " + std::to_string(size) + ", but " +
                          std::to_string(known->second) + " in another tensor",
                      "bind tensors of one size for '" + *name + "'");
      }
    } else {
      fits = std::get<std::int64_t>(dim) == size;
    }
  }
  if (fits) return {};
  return Status(Code::kRequest, where,
                "shape is " + tensor.shape.text() + " but the graph declares " + io.text(),
                "bind a tensor of that shape");
}

}  // namespace

Result<std::unique_ptr<BoundCall>> Engine::bind(const Tensors& bindings) {
  Dims sizes;
  std::size_t known = 0;
  for (const auto* specs : {&record_.inputs, &record_.outputs}) {
    for (const auto& [key, io] : *specs) {
      const std::string where = "engine '" + name_ + "', tensor '" + key + "'";
      const auto bound = bindings.find(key);
      if (bound == bindings.end()) {
        return Status(Code::kRequest, where, "not bound",
                      std::string("bind a ") + dtype_name(io.dtype) + " tensor " + io.text());
      }
      FREEWHEEL_TRY(check_tensor(bound->second, io, where, sizes));
      ++known;
    }
  }
  if (known != bindings.size()) {
    for (const auto& [key, tensor] : bindings) {
      if (record_.inputs.count(key) != 0 || record_.outputs.count(key) != 0) continue;
      std::vector<std::string> names;
      for (const auto& [input, io] : record_.inputs) names.push_back(input);
      for (const auto& [output, io] : record_.outputs) names.push_back(output);
      return Status(Code::kRequest, "engine '" + name_ + "', tensor '" + key + "'",
                    "no such input or output", nearest(key, std::move(names)));
    }
  }
  return bind_checked(bindings);
}

BackendTable backends() noexcept { return {kBackends, sizeof kBackends / sizeof kBackends[0] - 1}; }

Result<std::shared_ptr<Backend>> create_backend(const std::string& name,
                                                const BackendOptions& options) {
  std::string known;
  for (const BackendRow& row : backends()) {
    if (row.name == name) return row.create(options);
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  return Status(Code::kBackend, "backend '" + name + "'",
                "is not compiled into this library, which has " + (known.empty() ? "none" : known),
                "build the library with it (see docs/explanation/cpp.md)");
}

}  // namespace freewheel

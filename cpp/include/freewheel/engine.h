// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The small interface every backend speaks: load a compiled graph, bind tensors by address, run.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "freewheel/bundle.h"
#include "freewheel/manifest.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// An engine with every binding set. Keeps its engine alive; the bound memory must outlive it.
/// One call runs at a time on one session; different calls may run on different threads.
class BoundCall {
 public:
  virtual ~BoundCall() = default;

  /// Runs once (or enqueues, on a device) over the bound tensors; allocates nothing of ours.
  virtual Status run() noexcept = 0;
};

/// One compiled graph, loaded. Thread-safe.
class Engine {
 public:
  Engine(std::string name, EngineRecord record)
      : name_(std::move(name)), record_(std::move(record)) {}
  virtual ~Engine() = default;

  const std::string& name() const noexcept { return name_; }
  const EngineRecord& record() const noexcept { return record_; }

  /// Binds every input and output by address, after checking names, dtypes and shapes.
  Result<std::unique_ptr<BoundCall>> bind(const Tensors& bindings);

 protected:
  /// Binds tensors that were checked.
  virtual Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) = 0;

 private:
  std::string name_;
  EngineRecord record_;
};

/// What a backend is told once.
struct BackendOptions {
  int threads = 0;  ///< CPU threads of one engine call; 0 takes every core.
  int device = 0;   ///< Index of the GPU.
  /// Calls of one engine that may run at the same time, each with `threads`; further ones wait.
  int streams = 1;
  bool cuda_graphs = false;  ///< Replay each engine call as one CUDA graph.
};

/// A runtime that runs compiled graphs. Thread-safe; outlives its engines and its memory.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const noexcept = 0;

  /// Where every tensor that is bound must live.
  virtual Memory& memory() noexcept = 0;

  /// Loads the engine in `folder`, refusing one compiled for another version or machine.
  virtual Result<std::shared_ptr<Engine>> load(const std::string& folder) = 0;

  /// Compiles a graph in memory, for engines that don't fit this machine.
  virtual Result<std::shared_ptr<Engine>> compile(const std::string& onnx,
                                                  const std::string& graph_name,
                                                  const std::string& precision) = 0;
};

/// A row of the table of backends.
struct BackendRow {
  std::string_view name;
  Result<std::shared_ptr<Backend>> (*create)(const BackendOptions& options);
};

/// The backends that were compiled in, in the order in which they are preferred.
struct BackendTable {
  const BackendRow* first;
  std::size_t count;
  const BackendRow* begin() const noexcept { return first; }
  const BackendRow* end() const noexcept { return first + count; }
};
BackendTable backends() noexcept;

/// Creates a backend by name; says which there are where there is no such one.
Result<std::shared_ptr<Backend>> create_backend(const std::string& name,
                                                const BackendOptions& options);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// A folder that `freewheel build` wrote, opened for reading.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "freewheel/files.h"
#include "freewheel/manifest.h"
#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// What a compiled engine is and where it may run: the `engine.json` of its folder.
struct EngineRecord {
  std::string backend, version, machine, precision;
  std::string computed_in;  ///< `details.computed_in`; empty where the backend records none.
  std::map<std::string, Io> inputs, outputs;
  std::map<std::string, std::int64_t> files;

  /// Reads the record of the engine in `folder` and checks the files it lists.
  static Result<EngineRecord> read(const std::string& folder);

  /// Refuses an engine that was compiled for something else.
  Status require(const std::string& folder, const std::string& wanted_backend,
                 const std::string& wanted_version, const std::string& wanted_machine) const;
};

/// Factors of one sampler at one step count.
struct SamplerTable {
  std::vector<double> timesteps, sigmas;
  std::vector<double> rows;  ///< [steps, 2 * window]: of samples, then of model outputs.
  std::int64_t window = 1;

  std::int64_t steps() const noexcept { return static_cast<std::int64_t>(timesteps.size()); }
  const double* row(std::int64_t step_index) const noexcept {
    return rows.data() + static_cast<std::size_t>(2 * window * step_index);
  }
};

/// Opening checks the manifest, that no path leaves the folder, and every file's size. Weights are
/// memory-mapped: a tensor costs memory when it is touched. Thread-safe. Not movable: shared.
class Bundle {
 public:
  static Result<std::shared_ptr<const Bundle>> open(const std::string& folder);

  const std::string& folder() const noexcept { return folder_; }
  const Manifest& manifest() const noexcept { return manifest_; }

  /// Where a file of the bundle lies; refuses names that leave the folder.
  Result<std::string> path(const std::string& name) const;

  /// The engine set of `backend`, or null when none was built.
  const EngineSet* engines(const std::string& backend) const noexcept;

  /// A weight, mapped, valid as long as the bundle. Must not be written.
  Result<Tensor> tensor(const std::string& name) const;

  /// Reads a sampler's table.
  /// @param name Sampler, or empty for the pipeline's own.
  /// @param flow_shift Shift of the noise levels, or null for the default config's.
  /// @param latents Whose: those beside the first that have a schedule of their own have its shift.
  Result<SamplerTable> sampler(const std::string& name, const double* flow_shift,
                               std::int64_t steps, const std::string& latents = "latents") const;

 private:
  explicit Bundle(std::string folder) : folder_(std::move(folder)) {}
  Status check_files() const;

  std::string folder_;
  Manifest manifest_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, MappedFile> mapped_;
  mutable std::vector<Buffer> aligned_;
  mutable std::map<std::string, Tensor> tensors_;
};

}  // namespace freewheel

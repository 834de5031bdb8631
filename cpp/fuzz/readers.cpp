// SPDX-License-Identifier: Apache-2.0
#include "readers.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "freewheel/bundle.h"
#include "freewheel/dims.h"
#include "freewheel/files.h"
#include "freewheel/manifest.h"
#include "freewheel/settings.h"

namespace freewheel::fuzz {
namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

/// A refusal says where, what and what to do.
void check(const Status& status) {
  if (status.ok()) return;
  require(!status.where().empty() && !status.what().empty() && !status.hint().empty());
}

/// The path of a file without a name that holds these bytes until the next call.
std::string path_of(const std::uint8_t* data, std::size_t size) {
  static const int handle = ::memfd_create("fuzz", 0);
  require(::ftruncate(handle, 0) == 0);
  require(::pwrite(handle, data, size, 0) == static_cast<ssize_t>(size));
  return "/proc/self/fd/" + std::to_string(handle);
}

/// Reads every byte, so that a sanitizer sees a view that leaves its memory.
void touch(const Tensor& tensor) {
  const std::uint8_t* bytes = tensor.as<std::uint8_t>();
  volatile int sum = std::accumulate(bytes, bytes + tensor.bytes(), 0);
  (void)sum;
}

}  // namespace

void read_manifest(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto manifest = Manifest::parse(text, "manifest.json");
  if (!manifest.ok()) return check(manifest.status());
  (void)describe(*manifest, "plain");
  (void)derive_dims(*manifest, {{"batch", 1}, {"frames", 2}, {"height", 4}, {"width", 4}});
  for (const auto& [name, policy] : manifest->policies) {
    if (const auto values = policy.spec.resolve({}); !values.ok()) check(values.status());
  }
}

void read_safetensors(const std::uint8_t* data, std::size_t size) {
  const auto file = SafetensorsFile::open(path_of(data, size));
  if (!file.ok()) return check(file.status());
  for (const auto& [name, tensor] : file->tensors) touch(tensor);
}

void read_npy(const std::uint8_t* data, std::size_t size) {
  const auto buffer = freewheel::read_npy(path_of(data, size));
  if (!buffer.ok()) return check(buffer.status());
  touch(buffer->view());
}

void read_engine_record(const std::uint8_t* data, std::size_t size) {
  static const std::string folder = "/dev/shm/freewheel-fuzz-" + std::to_string(::getpid());
  ::mkdir(folder.c_str(), 0700);
  require(write_bytes(folder + "/engine.json", data, size).ok());
  const auto record = EngineRecord::read(folder);
  if (!record.ok()) check(record.status());
  ::unlink((folder + "/engine.json").c_str());
  ::rmdir(folder.c_str());
}

void read_overrides(const std::uint8_t* data, std::size_t size) {
  std::istringstream lines(std::string(reinterpret_cast<const char*>(data), size));
  Overrides overrides;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t at = line.find('=');
    if (at != std::string::npos) overrides.emplace_back(line.substr(0, at), line.substr(at + 1));
  }
  Manifest manifest;
  PolicySpec& spec = manifest.policies["fuzzed"].spec;
  spec.signals = {"temb"};
  spec.parameters["threshold"].default_value = 0.5;
  spec.parameters["coefficients"].shape = Shape{5};
  CacheSetting setting;
  setting.policy = "fuzzed";
  if (const Status status = apply_overrides(manifest, overrides, {}, setting); !status.ok()) {
    check(status);
  }
}

}  // namespace freewheel::fuzz

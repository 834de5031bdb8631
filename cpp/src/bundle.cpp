// SPDX-License-Identifier: Apache-2.0
#include "freewheel/bundle.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <tuple>

#include "json_value.h"
#include "streams.h"
#include "try.h"

namespace freewheel {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxManifestBytes = std::size_t{256} << 20;
constexpr std::size_t kMaxRecordBytes = std::size_t{16} << 20;
constexpr char kRebuild[] = "rebuild the engines on this machine with 'freewheel build'";

Result<std::string> safe_path(const std::string& folder, const std::string& name) {
  const fs::path pure(name);
  bool escapes = name.empty() || pure.is_absolute() || name.find('\\') != std::string::npos ||
                 name.find('\0') != std::string::npos;
  for (const fs::path& part : pure) escapes = escapes || part == "..";
  const fs::path path = fs::path(folder) / pure;
  std::error_code fault;
  if (!escapes) {
    const fs::path root = fs::weakly_canonical(folder, fault);
    const fs::path resolved = fault ? fs::path() : fs::weakly_canonical(path, fault);
    const auto [end, ignored] =
        std::mismatch(root.begin(), root.end(), resolved.begin(), resolved.end());
    escapes = fault || end != root.end();
  }
  if (escapes) {
    return Status(Code::kBundle, "manifest.json, path '" + name + "'", "leaves the bundle's folder",
                  "the bundle is damaged or hostile; build it again");
  }
  return path.string();
}

std::string shift_text(double shift) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", shift);
  return text;
}

bool read_ios(const nlohmann::json& entries, std::map<std::string, Io>& found) {
  if (!entries.is_object()) return false;
  for (const auto& [name, entry] : entries.items()) {
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
        !entry.contains("shape") || !entry["shape"].is_array()) {
      return false;
    }
    const auto dtype = dtype_from_name(entry["dtype"].get<std::string>());
    if (!dtype || entry["shape"].size() > static_cast<std::size_t>(Shape::kMaxRank)) return false;
    Io& io = found[name];
    io.dtype = *dtype;
    for (const auto& size : entry["shape"]) {
      if (size.is_string()) {
        io.shape.emplace_back(size.get<std::string>());
      } else if (size.is_number_integer()) {
        io.shape.emplace_back(size.get<std::int64_t>());
      } else {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

Result<EngineRecord> EngineRecord::read(const std::string& folder) {
  const std::string path = folder + "/engine.json";
  FREEWHEEL_ASSIGN(const std::string text, read_text(path, kMaxRecordBytes, Code::kBundle));
  FREEWHEEL_ASSIGN(const nlohmann::json data, parse_json(text, path, kRebuild));
  const auto unreadable = [&](const char* what) {
    return Status(Code::kBundle, path, std::string("not a readable engine record (") + what + ")",
                  kRebuild);
  };
  if (!data.is_object()) return unreadable("no object");
  const auto version = data.find("schema_version");
  if (version == data.end() || *version != 1) {
    return Status(Code::kBundle, path,
                  "schema version is " + (version == data.end() ? "missing" : version->dump()) +
                      ", this freewheel reads 1",
                  "use the freewheel that built it, or rebuild");
  }
  EngineRecord record;
  const std::pair<const char*, std::string*> texts[] = {{"backend", &record.backend},
                                                        {"version", &record.version},
                                                        {"machine", &record.machine},
                                                        {"precision", &record.precision}};
  for (const auto& [key, target] : texts) {
    const auto found = data.find(key);
    if (found == data.end() || !found->is_string()) return unreadable(key);
    *target = found->get<std::string>();
  }
  const auto details = data.find("details");
  if (details != data.end() && details->is_object()) {
    const auto found = details->find("computed_in");
    if (found != details->end() && found->is_string()) {
      record.computed_in = found->get<std::string>();
    }
  }
  if (!data.contains("inputs") || !read_ios(data["inputs"], record.inputs)) {
    return unreadable("inputs");
  }
  if (!data.contains("outputs") || !read_ios(data["outputs"], record.outputs)) {
    return unreadable("outputs");
  }
  if (!data.contains("files") || !data["files"].is_object()) return unreadable("files");
  for (const auto& [name, size] : data["files"].items()) {
    const std::string where = path + ", file '" + name + "'";
    if (name.empty() || name == ".." || name.find_first_of("/\\") != std::string::npos) {
      return Status(Code::kBundle, where, "the name leaves the engine's folder", kRebuild);
    }
    if (!size.is_number_unsigned()) return unreadable("files");
    std::error_code fault;
    const auto found = fs::file_size(fs::path(folder) / name, fault);
    if (fault || found != size.get<std::uint64_t>()) {
      const std::string state =
          fault ? "the file is missing" : "the file has " + std::to_string(found) + " bytes";
      return Status(Code::kBundle, where, state + ", " + size.dump() + " bytes were written",
                    kRebuild);
    }
    record.files[name] = size.get<std::int64_t>();
  }
  return record;
}

Status EngineRecord::require(const std::string& folder, const std::string& wanted_backend,
                             const std::string& wanted_version,
                             const std::string& wanted_machine) const {
  const std::tuple<const char*, const std::string&, const std::string&> pairs[] = {
      {"backend", backend, wanted_backend},
      {"version", version, wanted_version},
      {"machine", machine, wanted_machine}};
  for (const auto& [name, compiled, here] : pairs) {
    if (compiled != here) {
      return Status(Code::kBundle, folder,
                    std::string("compiled for ") + name + " '" + compiled + "', but here it is '" +
                        here + "'",
                    kRebuild);
    }
  }
  return {};
}

Result<std::shared_ptr<const Bundle>> Bundle::open(const std::string& folder) {
  std::shared_ptr<Bundle> bundle(new Bundle(folder));
  const std::string path = folder + "/manifest.json";
  auto text = read_text(path, kMaxManifestBytes, Code::kBundle);
  if (!text.ok()) {
    return Status(Code::kBundle, path, text.status().what(),
                  "give the folder that 'freewheel build' wrote");
  }
  FREEWHEEL_ASSIGN(bundle->manifest_, Manifest::parse(*text, path));
  FREEWHEEL_TRY(bundle->check_files());
  return std::shared_ptr<const Bundle>(std::move(bundle));
}

Status Bundle::check_files() const {
  for (const auto& [name, entry] : manifest_.files) {
    FREEWHEEL_ASSIGN(const std::string path, safe_path(folder_, name));
    std::error_code fault;
    const bool is_file = fs::is_regular_file(path, fault);
    const auto size = is_file ? fs::file_size(path, fault) : 0;
    if (!is_file || fault || size != static_cast<std::uintmax_t>(entry.bytes)) {
      const std::string found =
          is_file ? "has " + std::to_string(size) + " bytes" : std::string("is missing");
      return Status(Code::kBundle, folder_ + ", file '" + name + "'",
                    found + ", the manifest says " + std::to_string(entry.bytes) + " bytes",
                    "build the bundle again");
    }
  }
  for (const EngineSet& set : manifest_.engines) {
    for (const auto& [graph, file] : set.files) {
      if (auto path = safe_path(folder_, file); !path.ok()) return std::move(path).status();
    }
  }
  return {};
}

Result<std::string> Bundle::path(const std::string& name) const { return safe_path(folder_, name); }

const EngineSet* Bundle::engines(const std::string& backend) const noexcept {
  for (const EngineSet& set : manifest_.engines) {
    if (set.backend == backend) return &set;
  }
  return nullptr;
}

Result<Tensor> Bundle::tensor(const std::string& name) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = tensors_.find(name);
  if (known != tensors_.end()) return known->second;
  const auto entry = manifest_.tensors.find(name);
  if (entry == manifest_.tensors.end()) {
    return Status(Code::kBundle, folder_ + ", tensor '" + name + "'", "is not in the bundle",
                  "build it again");
  }
  const TensorEntry& wanted = entry->second;
  auto file = mapped_.find(wanted.file);
  if (file == mapped_.end()) {
    FREEWHEEL_ASSIGN(const std::string place, path(wanted.file));
    FREEWHEEL_ASSIGN(MappedFile mapped, MappedFile::open(place));
    file = mapped_.emplace(wanted.file, std::move(mapped)).first;
  }
  // Checked against the manifest when the bundle was opened; the file may have changed since.
  if (static_cast<std::uint64_t>(wanted.offset) + static_cast<std::uint64_t>(wanted.bytes) >
      file->second.size()) {
    return Status(Code::kBundle, folder_ + ", tensor '" + name + "'",
                  "lies outside file '" + wanted.file + "'", "build the bundle again");
  }
  Tensor tensor{file->second.data() + wanted.offset, wanted.dtype, wanted.shape};
  if (wanted.offset % static_cast<std::int64_t>(item_bytes(wanted.dtype)) != 0) {
    FREEWHEEL_ASSIGN(Buffer copy, Buffer::create(host_memory(), wanted.dtype, wanted.shape));
    std::memcpy(copy.view().data, tensor.data, tensor.bytes());
    tensor = copy.view();
    aligned_.push_back(std::move(copy));
  }
  tensors_[name] = tensor;
  return tensor;
}

Result<SamplerTable> Bundle::sampler(const std::string& name, const double* flow_shift,
                                     std::int64_t steps, const std::string& latents) const {
  std::string wanted = name;
  if (wanted.empty() && !manifest_.samplers.empty()) wanted = manifest_.samplers.front().name;
  const double shift = flow_shift != nullptr
                           ? *flow_shift
                           : manifest_.configs.at(manifest_.default_config).generation.flow_shift;
  const auto is_own = [&](const SamplerEntry& entry) { return entry.latents == latents; };
  const bool has_own = latents != kLatents &&
                       std::any_of(manifest_.samplers.begin(), manifest_.samplers.end(), is_own);
  std::vector<std::string> names, shifts;
  const SamplerEntry* chosen = nullptr;
  for (const SamplerEntry& entry : manifest_.samplers) {
    if (entry.latents != (has_own ? latents : kLatents)) continue;
    if (std::find(names.begin(), names.end(), entry.name) == names.end()) {
      names.push_back(entry.name);
    }
    if (entry.name != wanted) continue;
    shifts.push_back(shift_text(entry.flow_shift));
    const bool fits = has_own || std::fabs(shift - entry.flow_shift) < 1e-9;
    if (fits && chosen == nullptr) chosen = &entry;
  }
  if (names.empty()) {
    return Status(Code::kRequest, "bundle", "has no sampler's table",
                  "its pipeline's scheduler draws noise, or is no recurrence: run it in Python, or "
                  "drive it with begin(), set_prompt() and step()");
  }
  const std::string where = "sampler '" + wanted + "'" + (has_own ? " of '" + latents + "'" : "");
  if (shifts.empty()) {
    return Status(Code::kRequest, where, "is not in the bundle", nearest(wanted, names));
  }
  const auto listed = [](const std::vector<std::string>& values) {
    std::string text;
    for (const std::string& value : values) text += (text.empty() ? "" : ", ") + value;
    return text;
  };
  if (chosen == nullptr) {
    return Status(
        Code::kRequest, where,
        "has no table for flow shift " + shift_text(shift) + ", only for " + listed(shifts),
        "choose one of them, or build with a config that has this 'sample_shift'");
  }
  if (std::find(chosen->steps.begin(), chosen->steps.end(), steps) == chosen->steps.end()) {
    const std::string range =
        chosen->steps.empty()
            ? "none"
            : std::to_string(chosen->steps.front()) + " to " + std::to_string(chosen->steps.back());
    return Status(Code::kRequest, where,
                  "has no table for " + std::to_string(steps) + " steps (it has " +
                      std::to_string(chosen->steps.size()) + " from " + range + ")",
                  "choose another step count");
  }
  FREEWHEEL_ASSIGN(const std::string place, path(chosen->file));
  FREEWHEEL_ASSIGN(const SafetensorsFile file, SafetensorsFile::open(place, Code::kBundle));
  const auto found = file.tensors.find(std::to_string(steps));
  const std::int64_t columns = 2 + 2 * chosen->window;
  if (found == file.tensors.end() || found->second.dtype != DType::kFloat64 ||
      found->second.shape != Shape{steps, columns}) {
    return Status(Code::kBundle, place + ", tensor '" + std::to_string(steps) + "'",
                  "is no float64 " + Shape{steps, columns}.text(), "build the bundle again");
  }
  SamplerTable table;
  table.window = chosen->window;
  std::vector<double> packed(static_cast<std::size_t>(steps * columns));
  std::memcpy(packed.data(), found->second.data, packed.size() * sizeof(double));
  for (std::int64_t step = 0; step < steps; ++step) {
    const double* row = packed.data() + step * columns;
    table.timesteps.push_back(row[0]);
    table.sigmas.push_back(row[1]);
    table.rows.insert(table.rows.end(), row + 2, row + columns);
  }
  return table;
}

}  // namespace freewheel

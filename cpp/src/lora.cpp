// SPDX-License-Identifier: Apache-2.0
#include "freewheel/lora.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <set>
#include <thread>

#include "for_each_cpu.h"
#include "freewheel/policy_spec.h"
#include "try.h"

namespace freewheel {
namespace {

namespace fs = std::filesystem;

constexpr char kSuffix[] = ".safetensors";
constexpr char kFormat[] = "freewheel_lora", kFormatVersion[] = "1";
constexpr char kCheckpoint[] = "checkpoint_sha256";
constexpr char kRewrite[] = "write it again with 'freewheel lora' and this bundle";
constexpr std::int64_t kLeastPerThread = 1 << 18;  // products, below which no other thread is begun

constexpr std::int64_t kLanes = 16;  // columns that are added to at once, in registers,
constexpr std::int64_t kRows = 4;    // of so many rows
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// Whether a request may say it: letters, digits, '_', '.' and '-', and no dot in front.
bool is_plain(const std::string& name) {
  const auto is_word = [](unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  return !name.empty() && is_word(static_cast<unsigned char>(name.front())) &&
         std::all_of(name.begin(), name.end(),
                     [&](unsigned char c) { return is_word(c) || c == '.' || c == '-'; });
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code fault;
  for (fs::directory_iterator at(folder, fault), end; !fault && at != end; at.increment(fault)) {
    const std::string name = at->path().filename().string();
    if (ends_with(name, kSuffix)) names.push_back(name.substr(0, name.size() - sizeof kSuffix + 1));
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

/// Reads a number; NaN where it is none.
double scale_from_text(const std::string& text) {
  const Result<Value> scale = value_from_text(text);
  if (!scale.ok()) return NAN;
  if (const auto* number = std::get_if<double>(&*scale)) return *number;
  const auto* whole = std::get_if<std::int64_t>(&*scale);
  return whole == nullptr ? NAN : static_cast<double>(*whole);
}

/// The graphs' names of every weight that a denoise step reads, `{block}` filled in.
std::set<std::string> transformer_weights(const Manifest& manifest) {
  std::int64_t blocks = 0;
  for (const StageEntry& stage : manifest.stages) {
    blocks = std::max(blocks, stage.first + stage.count);
  }
  std::set<std::string> names;
  for (const auto& [graph, entry] : manifest.graphs) {
    if (entry.runs == "text_encoder" || entry.runs == "vae_decode") continue;
    for (const auto& [input, pattern] : entry.weights) {
      static constexpr char kBlock[] = "{block}";
      const std::size_t at = pattern.find(kBlock);
      if (at == std::string::npos) {
        names.insert(pattern);
        continue;
      }
      for (std::int64_t block = 0; block < blocks; ++block) {
        std::string name = pattern;
        names.insert(name.replace(at, sizeof kBlock - 1, std::to_string(block)));
      }
    }
  }
  return names;
}

/// What precedes the tensors of a part of the pipeline ("transformer"), or null where it is none.
const std::string* prefix_of(const Manifest& manifest, const std::string& part) {
  static const std::string none;
  if (manifest.experts.empty()) return part == "transformer" ? &none : nullptr;
  for (const ExpertEntry& expert : manifest.experts) {
    if (expert.part == part) return &expert.prefix;
  }
  return nullptr;
}

bool is_float(DType dtype) noexcept {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBfloat16;
}

/// Elements of all axes but the first.
std::int64_t columns_of(const Shape& shape) noexcept {
  std::int64_t columns = 1;
  for (int axis = 1; axis < shape.rank(); ++axis) columns *= shape[axis];
  return columns;
}

/// Copies float32 out of a file, where it may lie at any address.
Result<Buffer> aligned(const Tensor& tensor) {
  FREEWHEEL_ASSIGN(Buffer copy, Buffer::create(host_memory(), DType::kFloat32, tensor.shape));
  if (tensor.bytes() != 0) std::memcpy(copy.view().data, tensor.data, tensor.bytes());
  return copy;
}

/// Lays a matrix out in panels of `kLanes` columns, the last filled up with zeros, so that a
/// panel's rows follow each other in memory.
Result<Buffer> in_panels(const Tensor& matrix) {
  const std::int64_t rows = matrix.shape[0], columns = columns_of(matrix.shape);
  const std::int64_t panels = (columns + kLanes - 1) / kLanes;
  FREEWHEEL_ASSIGN(Buffer laid,
                   Buffer::create(host_memory(), DType::kFloat32, Shape{panels, rows, kLanes}));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t first = panel * kLanes, count = std::min(kLanes, columns - first);
      std::memcpy(laid.view().as<float>() + (panel * rows + row) * kLanes,
                  matrix.as<char>() + (row * columns + first) * std::int64_t{sizeof(float)},
                  static_cast<std::size_t>(count) * sizeof(float));
    }
  }
  return laid;
}

/// Adds scale · (factors · matrix) to `kRows` rows. Each sum takes its terms in order of rank, and
/// rounds after each product and each sum, on every machine: lanes are columns.
/// @param factors [kRows, rank].
/// @param panels The matrix, [panels, rank, kLanes].
/// @param rows [kRows, panels · kLanes].
FREEWHEEL_FOR_EACH_CPU
void add_products(const float* factors, const float* panels, std::int64_t rank, std::int64_t count,
                  float scale, float* rows) {
  for (std::int64_t panel = 0; panel < count; ++panel) {
    Lanes sums[kRows] = {};
    for (std::int64_t k = 0; k < rank; ++k) {
      Lanes values;
      std::memcpy(&values, panels + (panel * rank + k) * kLanes, sizeof values);
      for (std::int64_t row = 0; row < kRows; ++row) sums[row] += factors[row * rank + k] * values;
    }
    for (std::int64_t row = 0; row < kRows; ++row) {
      Lanes value;
      float* place = rows + (row * count + panel) * kLanes;
      std::memcpy(&value, place, sizeof value);
      value += scale * sums[row];
      std::memcpy(place, &value, sizeof value);
    }
  }
}

/// One change with its numbers where they can be read, `down` in panels, and its scale.
struct Loaded {
  Buffer down, up, magnitude, difference;
  float scale = 1.0f;

  static Result<Loaded> from(const Lora::Change& change, double scale) {
    Loaded loaded;
    loaded.scale = static_cast<float>(scale);
    if (change.down.data != nullptr) {
      FREEWHEEL_ASSIGN(loaded.down, in_panels(change.down));
    }
    const std::pair<const Tensor&, Buffer&> parts[] = {{change.up, loaded.up},
                                                       {change.magnitude, loaded.magnitude},
                                                       {change.difference, loaded.difference}};
    for (const auto& [tensor, buffer] : parts) {
      if (tensor.data == nullptr) continue;
      FREEWHEEL_ASSIGN(buffer, aligned(tensor));
    }
    return loaded;
  }

  /// Changes up to `kRows` rows of the weight.
  /// @param first The first one's index, of `count`.
  /// @param columns Of the weight, each row of which begins `stride` after the one before.
  /// @param plain The rows as the bundle has them, which a magnitude looks at.
  void apply(std::int64_t first, std::int64_t count, std::size_t columns, std::size_t stride,
             const std::vector<float>& plain, std::vector<float>& rows) const {
    if (!difference.empty()) {
      const float* values =
          difference.view().as<float>() + static_cast<std::size_t>(first) * columns;
      for (std::size_t row = 0; row < static_cast<std::size_t>(count); ++row) {
        for (std::size_t i = 0; i < columns; ++i) {
          rows[row * stride + i] += scale * values[row * columns + i];
        }
      }
      return;
    }
    const std::int64_t panels = down.view().shape[0], rank = down.view().shape[1];
    const float* factors = up.view().as<float>() + first * rank;
    std::vector<float> filled;
    if (count < kRows) {
      filled.assign(static_cast<std::size_t>(kRows * rank), 0.0f);
      std::copy(factors, factors + count * rank, filled.begin());
      factors = filled.data();
    }
    const auto add_to = [&](std::vector<float>& target) {
      add_products(factors, down.view().as<float>(), rank, panels, scale, target.data());
    };
    add_to(rows);
    if (magnitude.empty()) return;
    std::vector<float> alone = plain;
    add_to(alone);
    for (std::size_t row = 0; row < static_cast<std::size_t>(count); ++row) {
      double squares = 0.0;
      for (std::size_t i = 0; i < columns; ++i) {
        const double value = alone[row * stride + i];
        squares += value * value;
      }
      const float wanted = magnitude.view().as<float>()[static_cast<std::size_t>(first) + row];
      const float length = wanted / static_cast<float>(std::sqrt(squares));
      for (std::size_t i = 0; i < columns; ++i) rows[row * stride + i] *= length;
    }
  }
};

/// Applies changes to the rows [begin, end) of a weight.
Status merge_rows(const std::vector<Loaded>& changes, const Tensor& source, const Tensor& target,
                  std::int64_t begin, std::int64_t end) {
  const std::int64_t columns = columns_of(source.shape);
  const auto row_of = [&](const Tensor& whole, std::int64_t row) {
    const auto bytes = static_cast<std::size_t>(columns) * item_bytes(whole.dtype);
    return Tensor{whole.as<char>() + static_cast<std::size_t>(row) * bytes, whole.dtype,
                  Shape{columns}};
  };
  const std::int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  std::vector<float> rows(static_cast<std::size_t>(kRows * stride)), plain;
  const bool wants_plain = std::any_of(changes.begin(), changes.end(), [](const Loaded& change) {
    return !change.magnitude.empty();
  });
  for (std::int64_t first = begin; first < end; first += kRows) {
    const std::int64_t count = std::min(kRows, end - first);
    const auto values_of = [&](std::int64_t row) {
      return Tensor{rows.data() + row * stride, DType::kFloat32, Shape{columns}};
    };
    for (std::int64_t row = 0; row < count; ++row) {
      FREEWHEEL_TRY(convert(row_of(source, first + row), values_of(row)));
    }
    if (wants_plain) plain = rows;
    for (const Loaded& change : changes) {
      change.apply(first, count, static_cast<std::size_t>(columns),
                   static_cast<std::size_t>(stride), plain, rows);
    }
    for (std::int64_t row = 0; row < count; ++row) {
      FREEWHEEL_TRY(convert(values_of(row), row_of(target, first + row)));
    }
  }
  return {};
}

/// Shares the rows of a weight out over threads.
Status merge_weight(const std::vector<Loaded>& changes, const Tensor& source, const Tensor& target,
                    std::int64_t threads) {
  const std::int64_t rows = source.shape.rank() == 0 ? 1 : source.shape[0];
  std::int64_t products = 0;
  for (const Loaded& change : changes) {
    products += source.shape.elements() * (change.down.empty() ? 1 : change.down.view().shape[1]);
  }
  const std::int64_t shares =
      std::clamp<std::int64_t>(products / kLeastPerThread, 1, std::min(threads, rows));
  std::vector<std::future<Status>> others;
  for (std::int64_t share = 1; share < shares; ++share) {
    others.push_back(std::async(std::launch::async, merge_rows, std::cref(changes),
                                std::cref(source), std::cref(target), rows * share / shares,
                                rows * (share + 1) / shares));
  }
  Status status = merge_rows(changes, source, target, 0, rows / shares);
  for (auto& other : others) {
    Status theirs = other.get();
    if (status.ok()) status = std::move(theirs);
  }
  return status;
}

}  // namespace

Result<std::vector<LoraUse>> find_loras(const std::string& folder, const std::string& text) {
  std::vector<LoraUse> uses;
  if (text.empty()) return uses;
  if (folder.empty()) {
    return Status(Code::kRequest, "lora", "is '" + text + "', and no folder of LoRAs is open here",
                  "name the folder where the model is loaded (--lora-folder, 'lora_folder')");
  }
  for (const std::string& part : split(text)) {
    const std::size_t colon = part.find(':');
    const std::string name = part.substr(0, colon);
    const std::string where = "lora '" + name + "'";
    LoraUse use;
    if (colon != std::string::npos) {
      use.scale = scale_from_text(part.substr(colon + 1));
      if (!std::isfinite(static_cast<float>(use.scale))) {
        return Status(Code::kRequest, where, "has scale '" + part.substr(colon + 1) + "'",
                      "write name:0.8");
      }
    }
    if (!is_plain(name)) {
      return Status(Code::kRequest, where, "is no plain name",
                    "name a file of the folder of LoRAs without its .safetensors, as name:0.8");
    }
    use.path = (fs::path(folder) / (name + kSuffix)).string();
    std::error_code fault;
    if (!fs::is_regular_file(use.path, fault)) {
      return Status(Code::kRequest, where, "is not in the folder of LoRAs",
                    nearest(name, names_in(folder)));
    }
    use.written =
        static_cast<std::int64_t>(fs::last_write_time(use.path, fault).time_since_epoch().count());
    const auto is_same = [&](const LoraUse& other) { return other.path == use.path; };
    if (std::any_of(uses.begin(), uses.end(), is_same)) {
      return Status(Code::kRequest, where, "is named twice", "name it once, with the sum as scale");
    }
    uses.push_back(std::move(use));
  }
  return uses;
}

Result<Lora> Lora::open(const Bundle& bundle, const LoraUse& use) {
  if (bundle.manifest().weights == "baked") {
    return Status(Code::kRequest, use.path,
                  "can't be added: this bundle's weights are inside its engines",
                  "build the bundle with --weights inputs");
  }
  Lora lora;
  lora.scale_ = use.scale;
  FREEWHEEL_ASSIGN(lora.file_, SafetensorsFile::open(use.path));
  const auto stated = [&](const char* key) {
    const auto found = lora.file_.metadata.find(key);
    return found == lora.file_.metadata.end() ? std::string() : found->second;
  };
  if (stated(kFormat) != kFormatVersion) {
    return Status(Code::kRequest, use.path, "is no LoRA that 'freewheel lora' wrote", kRewrite);
  }
  const std::string& checkpoint = bundle.manifest().checkpoint_sha256;
  if (stated(kCheckpoint) != checkpoint) {
    return Status(Code::kRequest, use.path,
                  "was written for the checkpoint " + stated(kCheckpoint).substr(0, 12) +
                      ", the bundle is of " + checkpoint.substr(0, 12),
                  kRewrite);
  }
  struct Part {
    const char* suffix;
    const char* of;
    Tensor Change::*target;
  };
  static constexpr Part kParts[] = {
      {".lora_A.weight", ".weight", &Change::down},
      {".lora_B.weight", ".weight", &Change::up},
      {".lora_magnitude_vector.weight", ".weight", &Change::magnitude},
      {".lora_B.bias", ".bias", &Change::difference},
      {".difference", "", &Change::difference},
  };
  for (const auto& [name, tensor] : lora.file_.tensors) {
    const std::string where = use.path + ", tensor '" + name + "'";
    const Part* part = std::find_if(std::begin(kParts), std::end(kParts),
                                    [&](const Part& p) { return ends_with(name, p.suffix); });
    const std::size_t dot = name.find('.');
    const std::string* prefix = prefix_of(bundle.manifest(), name.substr(0, dot));
    if (part == std::end(kParts) || prefix == nullptr) {
      return Status(Code::kRequest, where, "changes no weight of this model", kRewrite);
    }
    if (tensor.dtype != DType::kFloat32) {
      return Status(Code::kRequest, where,
                    std::string("is ") + dtype_name(tensor.dtype) + ", expected float32", kRewrite);
    }
    const std::size_t length = name.size() - std::strlen(part->suffix);
    const std::string module = length > dot ? name.substr(dot + 1, length - dot - 1) : "";
    lora.changes_[*prefix + module + part->of].*(part->target) = tensor;
  }
  FREEWHEEL_TRY(lora.check(bundle, use.path));
  return lora;
}

Status Lora::check(const Bundle& bundle, const std::string& path) const {
  const Manifest& manifest = bundle.manifest();
  const std::set<std::string> known = transformer_weights(manifest);
  const auto is_known = [&](const std::string& name) {
    if (manifest.experts.empty()) return known.count(name) != 0;
    return std::any_of(manifest.experts.begin(), manifest.experts.end(),
                       [&](const ExpertEntry& expert) {
                         return name.compare(0, expert.prefix.size(), expert.prefix) == 0 &&
                                known.count(name.substr(expert.prefix.size())) != 0;
                       });
  };
  for (const auto& [name, change] : changes_) {
    const std::string where = path + ", weight '" + name + "'";
    const auto entry = manifest.tensors.find(name);
    if (entry == manifest.tensors.end() || !is_known(name)) {
      return Status(Code::kRequest, where, "is none of this model's", kRewrite);
    }
    const Shape& shape = entry->second.shape;
    if (!is_float(entry->second.dtype) || shape.rank() == 0) {
      return Status(Code::kRequest, where,
                    std::string("is ") + dtype_name(entry->second.dtype) + " " + shape.text() +
                        ", which no LoRA changes",
                    "build the bundle with --float8 convert");
    }
    if (change.difference.data != nullptr) {
      const bool is_alone = change.up.data == nullptr && change.down.data == nullptr &&
                            change.magnitude.data == nullptr;
      if (!is_alone) {
        return Status(Code::kRequest, where, "has a pair beside its difference", kRewrite);
      }
      if (change.difference.shape == shape) continue;
      return Status(Code::kRequest, where,
                    "is " + shape.text() + ", its change " + change.difference.shape.text(),
                    kRewrite);
    }
    if (change.up.data == nullptr || change.down.data == nullptr) {
      return Status(Code::kRequest, where, "has one half of a pair", kRewrite);
    }
    const Shape &up = change.up.shape, &down = change.down.shape;
    bool fits = up.rank() >= 2 && columns_of(up) == down[0] && up[0] == shape[0] &&
                down.rank() >= 2 && columns_of(down) == columns_of(shape);
    fits =
        fits && (change.magnitude.data == nullptr || change.magnitude.shape.elements() == shape[0]);
    if (fits) continue;
    return Status(Code::kRequest, where,
                  "is " + shape.text() + ", its change " + up.text() + " times " + down.text(),
                  kRewrite);
  }
  return {};
}

Result<std::vector<Lora>> open_loras(const Bundle& bundle, const std::vector<LoraUse>& uses) {
  std::vector<Lora> loras;
  for (const LoraUse& use : uses) {
    FREEWHEEL_ASSIGN(Lora lora, Lora::open(bundle, use));
    loras.push_back(std::move(lora));
  }
  return loras;
}

Result<Weights> merge_loras(const Bundle& bundle, const std::vector<Lora>& loras, int threads) {
  const auto count =
      static_cast<std::int64_t>(threads > 0 ? static_cast<unsigned>(threads)
                                            : std::max(1u, std::thread::hardware_concurrency()));
  std::map<std::string, std::vector<std::pair<const Lora::Change*, double>>> wanted;
  for (const Lora& lora : loras) {
    for (const auto& [name, change] : lora.changes()) {
      wanted[name].emplace_back(&change, lora.scale());
    }
  }
  Weights merged;
  for (const auto& [name, changes] : wanted) {
    std::vector<Loaded> loaded;
    for (const auto& [change, scale] : changes) {
      FREEWHEEL_ASSIGN(Loaded one, Loaded::from(*change, scale));
      loaded.push_back(std::move(one));
    }
    FREEWHEEL_ASSIGN(const Tensor source, bundle.tensor(name));
    FREEWHEEL_ASSIGN(Buffer target, Buffer::create(host_memory(), source.dtype, source.shape));
    FREEWHEEL_TRY(merge_weight(loaded, source, target.view(), count));
    merged.emplace(name, std::move(target));
  }
  return merged;
}

}  // namespace freewheel

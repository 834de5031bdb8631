// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Fields of a JSON document: typed, within limits, all faults told at once.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "json_value.h"
#include "limits.h"

namespace freewheel {

inline constexpr std::size_t kMaxFaultsShown = 10;

/// Reads fields of JSON objects and gathers what is wrong with them, by path.
class FieldReader {
 public:
  void fault(const std::string& path, const std::string& what) {
    ++count_;
    if (faults_.size() < kMaxFaultsShown) faults_.push_back("'" + path + "' " + what);
  }

  /// The member `key`, or null where it is missing (a fault unless optional).
  const nlohmann::json& member(const nlohmann::json& object, const std::string& path,
                               const char* key, bool optional = false) {
    static const nlohmann::json nothing;
    const auto found = object.is_object() ? object.find(key) : object.end();
    if (object.is_object() && found != object.end()) return *found;
    if (!optional) fault(join(path, key), "is missing");
    return nothing;
  }

  const nlohmann::json& object(const nlohmann::json& parent, const std::string& path,
                               const char* key, bool optional = false) {
    return typed(member(parent, path, key, optional), join(path, key),
                 nlohmann::json::value_t::object, "an object", optional);
  }

  const nlohmann::json& array(const nlohmann::json& parent, const std::string& path,
                              const char* key, bool optional = false) {
    return typed(member(parent, path, key, optional), join(path, key),
                 nlohmann::json::value_t::array, "a list", optional);
  }

  std::string text(const nlohmann::json& parent, const std::string& path, const char* key,
                   const char* fallback = nullptr) {
    const nlohmann::json& found = member(parent, path, key, fallback != nullptr);
    if (found.is_null() && fallback != nullptr) return fallback;
    if (found.is_string()) return found.get<std::string>();
    if (!found.is_null()) fault(join(path, key), "should be a string");
    return {};
  }

  std::optional<std::string> optional_text(const nlohmann::json& parent, const std::string& path,
                                           const char* key) {
    const nlohmann::json& found = member(parent, path, key, true);
    if (found.is_null()) return std::nullopt;
    if (found.is_string()) return found.get<std::string>();
    fault(join(path, key), "should be a string or null");
    return std::nullopt;
  }

  std::int64_t integer(const nlohmann::json& value, const std::string& path, std::int64_t low,
                       std::int64_t high) {
    if (value.is_number_integer()) {
      const bool huge = value.is_number_unsigned() &&
                        value.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxSeed);
      const auto found = huge ? kMaxSeed : value.get<std::int64_t>();
      if (!huge && found >= low && found <= high) return found;
      fault(path, "is " + value.dump() + ", outside [" + std::to_string(low) + ", " +
                      std::to_string(high) + "]");
    } else if (!value.is_null()) {
      fault(path, "should be an integer");
    }
    return low;
  }

  std::int64_t integer(const nlohmann::json& parent, const std::string& path, const char* key,
                       std::int64_t low, std::int64_t high,
                       std::optional<std::int64_t> fallback = std::nullopt) {
    const nlohmann::json& found = member(parent, path, key, fallback.has_value());
    if (found.is_null() && fallback) return *fallback;
    return integer(found, join(path, key), low, high);
  }

  std::optional<double> optional_number(const nlohmann::json& parent, const std::string& path,
                                        const char* key) {
    const nlohmann::json& found = member(parent, path, key, true);
    if (found.is_null()) return std::nullopt;
    if (found.is_number()) return found.get<double>();
    fault(join(path, key), "should be a number or null");
    return std::nullopt;
  }

  double number(const nlohmann::json& parent, const std::string& path, const char* key) {
    const nlohmann::json& found = member(parent, path, key);
    if (found.is_number()) return found.get<double>();
    if (!found.is_null()) fault(join(path, key), "should be a number");
    return 1.0;
  }

  bool flag(const nlohmann::json& parent, const std::string& path, const char* key) {
    const nlohmann::json& found = member(parent, path, key, true);
    if (found.is_boolean()) return found.get<bool>();
    if (!found.is_null()) fault(join(path, key), "should be true or false");
    return false;
  }

  DType dtype(const nlohmann::json& parent, const std::string& path, const char* key,
              const char* fallback = nullptr) {
    const std::string name = text(parent, path, key, fallback);
    const auto found = dtype_from_name(name);
    if (!found && !name.empty()) fault(join(path, key), "is '" + name + "', no dtype");
    return found.value_or(DType::kFloat32);
  }

  Shape shape(const nlohmann::json& list, const std::string& path, std::int64_t largest) {
    Shape found;
    if (!list.is_array()) return found;
    if (list.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
      fault(path, "has rank " + std::to_string(list.size()) + ", at most 8 is read");
      return found;
    }
    std::int64_t elements = 1;
    for (const nlohmann::json& size : list) {
      const std::int64_t read = integer(size, path, 0, kMaxSize);
      if (read != 0 && elements > largest / read) {
        fault(path, "has absurdly many elements");
        return found;
      }
      elements *= read;
      found.push_back(read);
    }
    return found;
  }

  bool is_sane_count(const nlohmann::json& container, const std::string& path) {
    if (container.size() <= kMaxEntries) return true;
    fault(path, "has " + std::to_string(container.size()) + " entries");
    return false;
  }

  Status status(const std::string& where) const {
    if (count_ == 0) return {};
    std::string what = std::to_string(count_) + (count_ == 1 ? " fault: " : " faults: ");
    for (std::size_t i = 0; i < faults_.size(); ++i) what += (i > 0 ? "; " : "") + faults_[i];
    return Status(Code::kBundle, where, what, "build the bundle again");
  }

  static std::string join(const std::string& path, const std::string& key) {
    return path.empty() ? key : path + "." + key;
  }

 private:
  const nlohmann::json& typed(const nlohmann::json& found, const std::string& path,
                              nlohmann::json::value_t type, const char* kind, bool optional) {
    static const nlohmann::json empty_object = nlohmann::json::object(),
                                empty_array = nlohmann::json::array();
    if (found.type() == type && is_sane_count(found, path)) return found;
    if (found.type() != type && !(found.is_null() && optional) && !found.is_null()) {
      fault(path, std::string("should be ") + kind);
    }
    return type == nlohmann::json::value_t::object ? empty_object : empty_array;
  }

  std::vector<std::string> faults_;
  std::size_t count_ = 0;
};

}  // namespace freewheel

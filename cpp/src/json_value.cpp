// SPDX-License-Identifier: Apache-2.0
#include "json_value.h"

#include <limits>
#include <set>
#include <vector>

namespace freewheel {
namespace {

constexpr int kMaxDepth = 64;

/// Watches a parse: stops at a key given twice, at deep nesting, and at syntax errors.
class Watcher : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return enter();
  }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    fault = "key '" + name + "' is given twice in one object";
    return false;
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    fault = "is not JSON (at byte " + std::to_string(position) + ")";
    return false;
  }

  std::string fault;

 private:
  bool enter() {
    if (++depth_ <= kMaxDepth) return true;
    fault = "is nested deeper than " + std::to_string(kMaxDepth);
    return false;
  }

  int depth_ = 0;
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

Result<nlohmann::json> parse_json(const std::string& text, const std::string& where,
                                  const std::string& hint) {
  Watcher watcher;
  if (!nlohmann::json::sax_parse(text, &watcher)) {
    return Status(Code::kBundle, where, watcher.fault.empty() ? "is not JSON" : watcher.fault,
                  hint);
  }
  return nlohmann::json::parse(text, nullptr, false);
}

std::optional<Value> value_from_json(const nlohmann::json& json) {
  if (json.is_boolean()) return Value(json.get<bool>());
  if (json.is_number_unsigned() &&
      json.get<std::uint64_t>() >
          static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    return Value(json.get<double>());
  }
  if (json.is_number_integer()) return Value(json.get<std::int64_t>());
  if (json.is_number_float()) return Value(json.get<double>());
  if (json.is_string()) return Value(json.get<std::string>());
  if (!json.is_array()) return std::nullopt;
  bool integers = true;
  for (const auto& element : json) {
    if (!element.is_number()) return std::nullopt;
    integers = integers && element.is_number_integer();
  }
  if (integers) return Value(json.get<std::vector<std::int64_t>>());
  return Value(json.get<std::vector<double>>());
}

nlohmann::json json_from_value(const Value& value) {
  return std::visit([](const auto& held) { return nlohmann::json(held); }, value);
}

}  // namespace freewheel

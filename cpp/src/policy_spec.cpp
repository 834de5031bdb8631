// SPDX-License-Identifier: Apache-2.0
#include "freewheel/policy_spec.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "json_value.h"
#include "try.h"

namespace freewheel {
namespace {

std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  std::string found = text;
  if (found.find_first_of(".en") == std::string::npos) found += ".0";
  return found;
}

template <typename T>
std::string list_text(const std::vector<T>& values) {
  std::string text = "[";
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ", ";
    text += value_text(Value(values[i]));
  }
  return text + "]";
}

/// A single element with what JSON said it was.
struct Element {
  double number = 0.0;
  bool is_bool = false, is_integer = false, is_number = false;
  std::string text;
};

Element element_of(const Value& value) {
  Element found;
  found.text = value_text(value);
  if (const bool* flag = std::get_if<bool>(&value)) {
    found.is_bool = true;
    found.number = *flag ? 1.0 : 0.0;
  } else if (const std::int64_t* integer = std::get_if<std::int64_t>(&value)) {
    found.is_number = found.is_integer = true;
    found.number = static_cast<double>(*integer);
  } else if (const double* real = std::get_if<double>(&value)) {
    found.is_number = true;
    found.number = *real;
  }
  return found;
}

Result<double> checked(const ParameterSpec& spec, const std::string& where,
                       const Element& element) {
  const bool fits = spec.dtype == DType::kBool    ? element.is_bool
                    : spec.dtype == DType::kInt64 ? element.is_integer
                                                  : element.is_number;
  if (!fits) {
    const char* kind = spec.dtype == DType::kBool    ? "true or false"
                       : spec.dtype == DType::kInt64 ? "an integer"
                                                     : "a number";
    return Status(Code::kConfig, where, std::string("expected ") + kind + ", found " + element.text,
                  spec.meaning);
  }
  // NOTE: written so that NaN fails every bound.
  const bool low = !spec.minimum || element.number >= *spec.minimum;
  const bool high = !spec.maximum || element.number <= *spec.maximum;
  if (!low || !high) {
    const std::string bounds = "[" + (spec.minimum ? number_text(*spec.minimum) : "-inf") + ", " +
                               (spec.maximum ? number_text(*spec.maximum) : "inf") + "]";
    return Status(Code::kConfig, where, element.text + " is outside " + bounds, spec.meaning);
  }
  if (!std::isfinite(element.number)) {
    return Status(Code::kConfig, where, element.text + " is not finite", spec.meaning);
  }
  return element.number;
}

std::vector<Value> elements_of(const Value& value) {
  std::vector<Value> found;
  if (const auto* integers = std::get_if<std::vector<std::int64_t>>(&value)) {
    found.assign(integers->begin(), integers->end());
  } else if (const auto* reals = std::get_if<std::vector<double>>(&value)) {
    found.assign(reals->begin(), reals->end());
  }
  return found;
}

/// Length of all matching parts of two texts: the longest common run, then left and right of it.
std::size_t matching(std::string_view a, std::string_view b) {
  std::size_t best = 0, best_a = 0, best_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size(); ++j) {
      std::size_t length = 0;
      while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) {
        ++length;
      }
      if (length > best) best = length, best_a = i, best_b = j;
    }
  }
  if (best == 0) return 0;
  return best + matching(a.substr(0, best_a), b.substr(0, best_b)) +
         matching(a.substr(best_a + best), b.substr(best_b + best));
}

/// Lists are also written as one number, or as "1,2,3".
Result<Value> as_list(const Value& value) {
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    return Value(std::vector<std::int64_t>{*integer});
  }
  if (const auto* real = std::get_if<double>(&value)) return Value(std::vector<double>{*real});
  const auto* text = std::get_if<std::string>(&value);
  return text == nullptr ? Result<Value>(value) : value_from_text("[" + *text + "]");
}

Result<std::int64_t> count_of(const std::string& where, const Value& value) {
  const std::int64_t* count = std::get_if<std::int64_t>(&value);
  if (count == nullptr || *count < 0) {
    return Status(Code::kConfig, where, "expected an integer >= 0, found " + value_text(value),
                  "give a number of steps");
  }
  return *count;
}

/// Seconds above 0, as a number or as "20s".
Result<double> seconds_of(const std::string& where, const Value& value) {
  Value given = value;
  const auto* text = std::get_if<std::string>(&value);
  if (text != nullptr && !text->empty() && text->back() == 's') {
    FREEWHEEL_ASSIGN(given, value_from_text(text->substr(0, text->size() - 1)));
  }
  const Element seconds = element_of(given);
  if (seconds.is_number && seconds.number > 0.0 && std::isfinite(seconds.number)) {
    return seconds.number;
  }
  return Status(Code::kConfig, where, "expected seconds above 0, found " + value_text(value),
                "give 20 or 20s");
}

}  // namespace

std::string value_text(const Value& value) {
  struct Text {
    std::string operator()(bool v) const { return v ? "True" : "False"; }
    std::string operator()(std::int64_t v) const { return std::to_string(v); }
    std::string operator()(double v) const { return number_text(v); }
    std::string operator()(const std::string& v) const { return "'" + v + "'"; }
    std::string operator()(const std::vector<std::int64_t>& v) const { return list_text(v); }
    std::string operator()(const std::vector<double>& v) const { return list_text(v); }
  };
  return std::visit(Text{}, value);
}

Result<Value> value_from_text(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded()) return Value(text);
  auto value = value_from_json(json);
  if (!value) {
    return Status(Code::kConfig, "value '" + text + "'",
                  "is no number, truth value, word or list of numbers", "write it as in a config");
  }
  return *value;
}

Result<Value> spelled(const Value& value) {
  const auto* text = std::get_if<std::string>(&value);
  return text == nullptr ? Result<Value>(value) : value_from_text(*text);
}

Result<std::vector<double>> ParameterSpec::numbers(const std::string& name,
                                                   const Value& value) const {
  const std::string where = "parameter '" + name + "'";
  if (!choices.empty()) {
    const std::string* chosen = std::get_if<std::string>(&value);
    const auto found =
        chosen == nullptr ? choices.end() : std::find(choices.begin(), choices.end(), *chosen);
    if (found == choices.end()) {
      return Status(Code::kConfig, where, "unknown choice " + value_text(value),
                    nearest(chosen == nullptr ? value_text(value) : *chosen, choices));
    }
    return std::vector<double>{static_cast<double>(found - choices.begin())};
  }
  if (shape.rank() == 0) {
    FREEWHEEL_ASSIGN(const double number, checked(*this, where, element_of(value)));
    return std::vector<double>{number};
  }
  const std::vector<Value> elements = elements_of(value);
  if (elements.empty()) {
    return Status(Code::kConfig, where, "expected a list of numbers, found " + value_text(value),
                  meaning);
  }
  const std::size_t size = static_cast<std::size_t>(shape[0]);
  if (elements.size() > size) {
    return Status(Code::kConfig, where,
                  "has " + std::to_string(elements.size()) + " values, at most " +
                      std::to_string(size) + " fit",
                  meaning);
  }
  std::vector<double> found;
  for (std::size_t i = 0; i < elements.size(); ++i) {
    FREEWHEEL_ASSIGN(const double number, checked(*this, where + "[" + std::to_string(i) + "]",
                                                  element_of(elements[i])));
    found.push_back(number);
  }
  if (pad_front) {
    found.insert(found.begin(), size - found.size(), 0.0);
  } else {
    found.resize(size, found.back());
  }
  return found;
}

Result<std::map<std::string, std::vector<double>>> PolicySpec::resolve(
    const std::map<std::string, Value>& given) const {
  for (const auto& [key, value] : given) {
    if (parameters.count(key) != 0) continue;
    std::vector<std::string> known;
    for (const auto& [parameter, spec] : parameters) known.push_back(parameter);
    return Status(Code::kConfig, "parameter '" + key + "' of policy '" + name + "'", "is not known",
                  nearest(key, std::move(known)));
  }
  std::map<std::string, std::vector<double>> resolved;
  for (const auto& [key, spec] : parameters) {
    const auto found = given.find(key);
    FREEWHEEL_ASSIGN(resolved[key],
                     spec.numbers(key, found == given.end() ? spec.default_value : found->second));
  }
  for (const auto& [key, spec] : parameters) {
    if (!spec.listed_in) continue;
    std::vector<double> known = resolved.at(*spec.listed_in);
    known.erase(std::unique(known.begin(), known.end()), known.end());  // what fills a list up
    if (std::find(known.begin(), known.end(), resolved[key][0]) != known.end()) continue;
    std::string listed;
    for (const double value : known) {
      listed += (listed.empty() ? "" : ", ") + std::to_string(static_cast<std::int64_t>(value));
    }
    return Status(Code::kConfig, "parameter '" + key + "'",
                  std::to_string(static_cast<std::int64_t>(resolved[key][0])) + " is none of '" +
                      *spec.listed_in + "'",
                  "give one of " + listed);
  }
  return resolved;
}

CacheSetting CacheSetting::for_branch(const std::string& name) const {
  CacheSetting own = *this;
  own.branches.clear();
  const auto found = branches.find(name);
  if (found == branches.end()) return own;
  for (const auto& [key, value] : found->second) own.parameters[key] = value;
  return own;
}

std::vector<std::string> override_names(const PolicySpec& spec, const Guard& guard) {
  std::vector<std::string> names = {"exact_steps", "signal", "deadline", "min_psnr"};
  for (const auto& [name, limit] : guard.limits) names.push_back(name);
  for (const auto& [name, parameter] : spec.parameters) names.push_back(name);
  return names;
}

Status apply_override(const std::string& key, const Value& value, const PolicySpec& spec,
                      CacheSetting& setting, const std::vector<std::string>& also_known) {
  const std::string where = "parameter '" + key + "'";
  if (const auto parameter = spec.parameters.find(key); parameter != spec.parameters.end()) {
    const bool is_list = parameter->second.shape.rank() != 0;
    FREEWHEEL_ASSIGN(const Value given, is_list ? as_list(value) : Result<Value>(value));
    FREEWHEEL_ASSIGN([[maybe_unused]] const auto numbers, parameter->second.numbers(key, given));
    setting.parameters[key] = given;
    if (key == "computed_steps") setting.min_psnr.reset();
    for (auto& [branch, own] : setting.branches) own.erase(key);
    return {};
  }
  if (key == "signal") {
    const std::string* name = std::get_if<std::string>(&value);
    if (name == nullptr ||
        std::find(spec.signals.begin(), spec.signals.end(), *name) == spec.signals.end()) {
      return Status(Code::kConfig, where,
                    "policy '" + spec.name + "' takes no " + value_text(value),
                    spec.signals.empty() ? "remove it, none is looked at"
                                         : nearest(name == nullptr ? "" : *name, spec.signals));
    }
    setting.signal = *name;
    return {};
  }
  if (key == "deadline") {
    FREEWHEEL_ASSIGN(setting.deadline, seconds_of(where, value));
    return {};
  }
  if (key == "min_psnr") {
    const Element decibels = element_of(value);
    if (!decibels.is_number || !(decibels.number > 0.0) || !std::isfinite(decibels.number)) {
      return Status(Code::kConfig, where, "expected dB above 0, found " + value_text(value),
                    "give 30 to 50");
    }
    setting.min_psnr = decibels.number;
    return {};
  }
  Guard& guard = setting.guard;
  if (key == "exact_steps") {
    FREEWHEEL_ASSIGN(const Value given, as_list(value));
    std::vector<std::int64_t> steps;
    for (const Value& element : elements_of(given)) {
      FREEWHEEL_ASSIGN(const std::int64_t step, count_of(where, element));
      steps.push_back(step);
    }
    guard.exact_steps = std::move(steps);
    return {};
  }
  const auto limit = guard.limits.find(key);
  if (limit == guard.limits.end()) {
    std::vector<std::string> known = override_names(spec, guard);
    known.insert(known.end(), also_known.begin(), also_known.end());
    return Status(Code::kConfig, where, "policy '" + spec.name + "' has none",
                  nearest(key, std::move(known)));
  }
  FREEWHEEL_ASSIGN(limit->second, count_of(where, value));
  return {};
}

std::string nearest(const std::string& name, std::vector<std::string> known) {
  std::sort(known.begin(), known.end());
  const std::string* best = nullptr;
  double best_ratio = 0.5;
  std::string listed;
  for (const std::string& candidate : known) {
    if (!listed.empty()) listed += ", ";
    listed += candidate;
    const std::size_t total = name.size() + candidate.size();
    // Names of requests may be long and hostile: the comparison is cubic.
    if (total == 0 || name.size() > 200) continue;
    const double ratio =
        2.0 * static_cast<double>(matching(candidate, name)) / static_cast<double>(total);
    if (ratio >= best_ratio) best = &candidate, best_ratio = ratio;
  }
  return (best != nullptr ? "did you mean '" + *best + "'? " : std::string()) + "known: " + listed;
}

}  // namespace freewheel

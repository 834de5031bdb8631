// SPDX-License-Identifier: Apache-2.0
#include "request_options.h"

#include <cmath>
#include <map>
#include <variant>

#include "try.h"

namespace freewheel::triton {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 31;

struct Whole {
  std::optional<std::int64_t>* target;
  std::int64_t minimum, maximum;
};
using Field = std::variant<std::string*, std::optional<double>*, Whole, bool*>;

Status wrong(const std::string& name, const Value& value, const std::string& expected) {
  return Status(Code::kRequest, "parameter '" + name + "'", "is " + value_text(value),
                "give " + expected);
}

/// Text may spell a number, a truth value or a list.
Result<Value> spelled(const Value& value) {
  const auto* text = std::get_if<std::string>(&value);
  return text == nullptr ? Result<Value>(value) : value_from_text(*text);
}

Status assign(const std::string& name, const Value& given, const Field& field) {
  if (auto* const* target = std::get_if<std::string*>(&field)) {
    const auto* text = std::get_if<std::string>(&given);
    if (text == nullptr) return wrong(name, given, "a name");
    **target = *text;
    return {};
  }
  FREEWHEEL_ASSIGN(const Value value, spelled(given));
  if (auto* const* target = std::get_if<bool*>(&field)) {
    const bool* flag = std::get_if<bool>(&value);
    if (flag == nullptr) return wrong(name, value, "true or false");
    **target = *flag;
    return {};
  }
  const auto* whole = std::get_if<std::int64_t>(&value);
  if (const Whole* limits = std::get_if<Whole>(&field)) {
    if (whole == nullptr || *whole < limits->minimum || *whole > limits->maximum) {
      return wrong(name, value,
                   "a whole number from " + std::to_string(limits->minimum) + " to " +
                       std::to_string(limits->maximum));
    }
    *limits->target = *whole;
    return {};
  }
  const double* number = std::get_if<double>(&value);
  if ((whole == nullptr && number == nullptr) || (number != nullptr && !std::isfinite(*number))) {
    return wrong(name, value, "a finite number");
  }
  **std::get_if<std::optional<double>*>(&field) =
      whole != nullptr ? static_cast<double>(*whole) : *number;
  return {};
}

std::set<std::string> listed(const std::string& text) {
  std::set<std::string> found;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) found.insert(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return found;
}

/// Where each name goes. `stream` and `outputs` are turned into their types afterwards.
std::map<std::string, Field> fields_of(RequestOptions& options, std::optional<std::int64_t>& stream,
                                       std::string& outputs) {
  return {{"policy", &options.policy},
          {"sampler", &options.sampler},
          {"steps", Whole{&options.steps, 1, kMost}},
          {"seed", Whole{&options.seed, 0, INT64_MAX}},
          {"height", Whole{&options.height, 1, kMost}},
          {"width", Whole{&options.width, 1, kMost}},
          {"frames", Whole{&options.frames, 1, kMost}},
          {"guidance_scale", &options.guidance_scale},
          {"flow_shift", &options.flow_shift},
          {"stream", Whole{&stream, 0, kMost}},
          {"preview", &options.preview},
          {"outputs", &outputs}};
}

/// Parameters of Triton's own protocol, which say nothing to a model.
bool is_protocol(const std::string& name) {
  return name.rfind("triton_", 0) == 0 || name == "binary_data_output" || name == "priority" ||
         name == "timeout";
}

}  // namespace

Result<RequestOptions> RequestOptions::read(const Parameters& parameters) {
  RequestOptions options;
  std::optional<std::int64_t> stream;
  std::string outputs;
  const std::map<std::string, Field> fields = fields_of(options, stream, outputs);
  for (const auto& [name, value] : parameters) {
    if (is_protocol(name)) continue;
    if (const auto field = fields.find(name); field != fields.end()) {
      FREEWHEEL_TRY(assign(name, value, field->second));
      continue;
    }
    FREEWHEEL_ASSIGN(Value override_value, spelled(value));
    options.overrides.emplace_back(name, std::move(override_value));
  }
  options.stream = stream.value_or(0);
  options.outputs = listed(outputs);
  if (options.preview && options.stream == 0) {
    return Status(Code::kRequest, "parameter 'preview'", "is true, but nothing is streamed",
                  "give stream=1 as well");
  }
  return options;
}

std::vector<std::string> RequestOptions::names() {
  RequestOptions options;
  std::optional<std::int64_t> stream;
  std::string outputs;
  std::vector<std::string> found;
  for (const auto& [name, field] : fields_of(options, stream, outputs)) found.push_back(name);
  return found;
}

}  // namespace freewheel::triton

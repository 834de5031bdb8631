// SPDX-License-Identifier: Apache-2.0
#include "request_options.h"

#include <algorithm>

#include "try.h"

namespace freewheel::triton {
namespace {

constexpr char kStream[] = "stream", kPreview[] = "preview", kOutputs[] = "outputs";
constexpr char kPolicyPrefix[] = "policy.";

Status wrong(const std::string& name, const Value& value, const char* expected) {
  return Status(Code::kRequest, name, "is " + value_text(value), std::string("give ") + expected);
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.rfind(start, 0) == 0;
}

/// Parameters of Triton's own protocol, which say nothing to a model.
bool is_protocol(const std::string& name) {
  return starts_with(name, "triton_") || name == "binary_data_output" || name == "priority" ||
         name == "timeout";
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

Status take(const std::string& name, const Value& value, RequestOptions& options) {
  if (name == kOutputs) {
    const auto* text = std::get_if<std::string>(&value);
    if (text == nullptr) return wrong(name, value, "names with commas between them");
    options.outputs = listed(*text);
    return {};
  }
  if (name == kStream || name == kPreview) {
    FREEWHEEL_ASSIGN(const Value meant, spelled(value));
    const auto* every = std::get_if<std::int64_t>(&meant);
    const auto* flag = std::get_if<bool>(&meant);
    if (name == kPreview) {
      if (flag == nullptr) return wrong(name, meant, "true or false");
      options.preview = *flag;
      return {};
    }
    if (every == nullptr || *every < 0) return wrong(name, meant, "a whole number from 0 on");
    options.stream = *every;
    return {};
  }
  Request& request = options.request;
  if (Request::knows(name)) return request.set(name, value);
  const bool has_prefix = starts_with(name, kPolicyPrefix);
  request.overrides.emplace_back(has_prefix ? name.substr(sizeof kPolicyPrefix - 1) : name, value);
  return {};
}

}  // namespace

Result<RequestOptions> RequestOptions::read(const Parameters& parameters) {
  RequestOptions options;
  options.request.also_known = Request::names();
  for (const char* own : {kStream, kPreview, kOutputs}) options.request.also_known.push_back(own);
  for (const auto& [name, value] : parameters) {
    if (!is_protocol(name)) FREEWHEEL_TRY(take(name, value, options));
  }
  if (options.preview && options.stream == 0) {
    return Status(Code::kRequest, kPreview, "is true, but nothing is streamed",
                  "give stream=1 as well");
  }
  return options;
}

}  // namespace freewheel::triton

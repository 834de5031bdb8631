// SPDX-License-Identifier: Apache-2.0
#include "served_options.h"

#include <algorithm>
#include <map>
#include <variant>

#include "freewheel/policy_spec.h"
#include "json_value.h"
#include "try.h"

namespace freewheel::triton {
namespace {

struct Count {
  std::int64_t* target;
  std::int64_t minimum, maximum;
};
using Field = std::variant<std::string*, bool*, Count>;

Status assign(const std::string& where, const std::string& text, const Field& field) {
  if (auto* const* name = std::get_if<std::string*>(&field)) {
    **name = text;
    return {};
  }
  FREEWHEEL_ASSIGN(const Value value, value_from_text(text));
  if (auto* const* flag = std::get_if<bool*>(&field)) {
    const bool* given = std::get_if<bool>(&value);
    if (given == nullptr) {
      return Status(Code::kConfig, where, "is '" + text + "'", "write true or false");
    }
    **flag = *given;
    return {};
  }
  const Count& count = *std::get_if<Count>(&field);
  const auto* given = std::get_if<std::int64_t>(&value);
  if (given == nullptr || *given < count.minimum || *given > count.maximum) {
    return Status(Code::kConfig, where, "is '" + text + "'",
                  "write a whole number from " + std::to_string(count.minimum) + " to " +
                      std::to_string(count.maximum));
  }
  *count.target = *given;
  return {};
}

}  // namespace

Result<ServedOptions> ServedOptions::parse(const std::string& config_json,
                                           const std::string& where) {
  FREEWHEEL_ASSIGN(const nlohmann::json config,
                   parse_json(config_json, where, "write config.pbtxt with 'freewheel serve'"));
  ServedOptions options;
  const std::map<std::string, Field> fields = {
      {"backend", &options.backend},
      {"threads", Count{&options.threads, 0, 4096}},
      {"device", Count{&options.device, 0, 1024}},
      {"cuda_graphs", &options.cuda_graphs},
      {"offload", &options.offload},
      {"lora_folder", &options.lora_folder},
      {"allow_compile", &options.allow_compile},
      {"max_pixels", Count{&options.max_pixels, 1, std::int64_t{1} << 45}},
  };
  const auto groups = config.find("instance_group");
  if (groups != config.end() && groups->is_array()) {
    std::int64_t instances = 0;
    for (const nlohmann::json& group : *groups) instances += group.value("count", 1);
    options.instances = std::clamp<std::int64_t>(instances, 1, 4096);
  }
  const auto parameters = config.find("parameters");
  if (parameters == config.end() || !parameters->is_object()) return options;
  for (const auto& [name, parameter] : parameters->items()) {
    const std::string place = where + ", config.pbtxt, parameter '" + name + "'";
    const auto field = fields.find(name);
    if (field == fields.end()) {
      std::vector<std::string> known;
      for (const auto& [key, target] : fields) known.push_back(key);
      return Status(Code::kConfig, place, "is not known", nearest(name, std::move(known)));
    }
    FREEWHEEL_TRY(assign(place, parameter.value("string_value", std::string()), field->second));
  }
  return options;
}

}  // namespace freewheel::triton

// SPDX-License-Identifier: Apache-2.0
/// Tokenizers as OpenVINO's own package compiles them.

#include <cstdlib>
#include <exception>
#include <openvino/openvino.hpp>

#include "openvino_fault.h"
#include "tokenizer.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kOutput[] = "input_ids";

/// Where the operators lie: as the environment says, else where they lay when this was built.
std::string operators() {
  const char* given = std::getenv("FREEWHEEL_TOKENIZERS");
  return given != nullptr && *given != '\0' ? given : FREEWHEEL_TOKENIZERS;
}

class OpenVinoTokenizer final : public Tokenizer {
 public:
  OpenVinoTokenizer(const std::string& file, const std::string& operators) {
    core_.add_extension(operators);
    request_ =
        core_.compile_model(file, "CPU", ov::inference_num_threads(1)).create_infer_request();
  }

  Result<std::vector<std::int64_t>> ids(const std::string& text) override {
    try {
      std::string held = text;
      request_.set_input_tensor(ov::Tensor(ov::element::string, ov::Shape{1}, &held));
      request_.infer();
      const ov::Tensor found = request_.get_tensor(kOutput);
      const auto* first = found.data<std::int64_t>();
      return std::vector<std::int64_t>(first, first + found.get_size());
    } catch (const std::exception& fault) {
      return Status(Code::kFailed, "tokenizer", fault_text(fault), "give the prompt's token ids");
    }
  }

 private:
  ov::Core core_;
  ov::InferRequest request_;
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> load_tokenizer(const std::string& file) {
  const std::string library = operators();
  try {
    return std::unique_ptr<Tokenizer>(std::make_unique<OpenVinoTokenizer>(file, library));
  } catch (const std::exception& fault) {
    return Status(Code::kBackend, "tokenizer",
                  "can't be loaded with '" + library + "': " + fault_text(fault),
                  "set FREEWHEEL_TOKENIZERS to libopenvino_tokenizers.so of OpenVINO's version "
                  "(pip install openvino-tokenizers), or give token ids");
  }
}

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/model.h"

#include <algorithm>

#include "offload.h"
#include "tokenizer.h"
#include "try.h"

namespace freewheel {
namespace {

constexpr char kBlockMark[] = "{block}";

std::string weight_name(std::string pattern, std::int64_t block) {
  const std::size_t at = pattern.find(kBlockMark);
  if (at != std::string::npos) {
    pattern.replace(at, sizeof kBlockMark - 1, std::to_string(block));
  }
  return pattern;
}

bool is_template(const GraphEntry& graph) {
  return std::any_of(graph.weights.begin(), graph.weights.end(), [](const auto& weight) {
    return weight.second.find(kBlockMark) != std::string::npos;
  });
}

std::string built_names(const Manifest& manifest) {
  std::string names;
  for (const EngineSet& set : manifest.engines) names += (names.empty() ? "" : ", ") + set.backend;
  return names;
}

/// Takes the first compiled-in backend that the bundle has engines for.
std::string choose_backend(const Manifest& manifest) {
  for (const BackendRow& row : backends()) {
    for (const EngineSet& set : manifest.engines) {
      if (set.backend == row.name) return set.backend;
    }
  }
  return manifest.engines.front().backend;
}

}  // namespace

Model::Model() = default;
Model::~Model() = default;

Result<std::shared_ptr<Model>> Model::load(std::shared_ptr<const Bundle> bundle,
                                           const ModelOptions& options) {
  std::shared_ptr<Model> model(new Model());
  model->bundle_ = std::move(bundle);
  model->allow_compile_ = options.allow_compile;
  model->check_finite_ = options.check_finite;
  model->lora_folder_ = options.lora_folder;
  model->threads_ = options.backend_options.threads;
  const Manifest& manifest = model->manifest();
  if (options.custom_backend != nullptr) {
    model->backend_ = options.custom_backend;
  } else {
    const std::string name = options.backend.empty() ? choose_backend(manifest) : options.backend;
    FREEWHEEL_ASSIGN(model->backend_, create_backend(name, options.backend_options));
  }
  const std::string name = model->backend_->name();
  model->set_ = model->bundle_->engines(name);
  if (model->set_ == nullptr && !options.allow_compile) {
    return Status(Code::kBackend, "backend '" + name + "'",
                  "the bundle has engines for " + built_names(manifest) + " only",
                  "build it again with --backend " + name);
  }
  if (options.offload && manifest.weights == "baked") {
    return Status(Code::kRequest, "offload",
                  "can't be had: this bundle's weights are inside its engines",
                  "build the bundle with --weights inputs");
  }
  if (options.offload) model->offload();
  return model;
}

Result<std::shared_ptr<Model>> Model::load(const std::string& folder, const ModelOptions& options) {
  FREEWHEEL_ASSIGN(std::shared_ptr<const Bundle> bundle, Bundle::open(folder));
  return load(std::move(bundle), options);
}

std::shared_ptr<Model> Model::with_weights(std::shared_ptr<Model> model, Weights weights) {
  std::shared_ptr<Model> other(new Model());
  other->bundle_ = model->bundle_;
  other->backend_ = model->backend_;
  other->check_finite_ = model->check_finite_;
  other->changed_ = std::move(weights);
  other->base_ = std::move(model);
  if (other->base_->offloaded_ != nullptr) other->offload();
  return other;
}

void Model::offload() {
  OffloadedWeights* base = base_ == nullptr ? nullptr : base_->offloaded_.get();
  offloaded_ = std::make_unique<OffloadedWeights>(
      memory(), [this](const std::string& name) { return host_weight(name); },
      [this](const std::string& name) { return changed_.count(name) != 0; }, base);
}

Status Model::load_all() {
  for (const auto& [name, graph] : manifest().graphs) {
    // A baked body has no engines for its templates: nothing runs them.
    if (set_ != nullptr && set_->files.count(name) == 0) continue;
    if (auto loaded = engine(name); !loaded.ok()) return std::move(loaded).status();
  }
  // Where the tokenizer's operators are missing, requests bring token ids; a text is told why.
  if (manifest().tokenizer) (void)token_ids("");
  if (offloaded_ != nullptr) return {};  // bodies read their blocks as they are bound
  for (const auto& [name, tensor] : manifest().tensors) {
    if (auto loaded = weight(name); !loaded.ok()) return std::move(loaded).status();
  }
  return {};
}

Result<std::shared_ptr<Engine>> Model::engine(const std::string& graph) {
  if (base_ != nullptr) return base_->engine(graph);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = engines_.find(graph);
  if (known != engines_.end()) return known->second;
  const std::string where = bundle_->folder() + ", graph '" + graph + "'";
  const auto entry = manifest().graphs.find(graph);
  if (entry == manifest().graphs.end()) {
    return Status(Code::kBundle, where, "is not in the bundle", "build it again");
  }
  Status fault(Code::kBundle, where, std::string("has no engine for ") + backend_->name(),
               "build the bundle again");
  const auto file = set_ == nullptr ? decltype(set_->files.begin()){} : set_->files.find(graph);
  if (set_ != nullptr && file != set_->files.end()) {
    FREEWHEEL_ASSIGN(const std::string folder, bundle_->path(file->second));
    auto loaded = backend_->load(folder);
    if (loaded.ok()) return engines_[graph] = std::move(loaded).value();
    fault = std::move(loaded).status();
  }
  if (!allow_compile_) return fault;
  const std::string& portable = entry->second.file;
  std::string adapted =
      portable.substr(0, portable.rfind(".onnx")) + "." + backend_->name() + ".onnx";
  FREEWHEEL_ASSIGN(const std::string onnx,
                   bundle_->path(manifest().files.count(adapted) != 0 ? adapted : portable));
  FREEWHEEL_ASSIGN(std::shared_ptr<Engine> compiled,
                   backend_->compile(onnx, graph, entry->second.precision));
  return engines_[graph] = std::move(compiled);
}

Result<Tensor> Model::host_weight(const std::string& name) {
  const auto changed = changed_.find(name);
  if (changed != changed_.end()) return changed->second.view();
  return bundle_->tensor(name);
}

Result<Tensor> Model::weight(const std::string& name) {
  if (backend_->memory().is_host()) return host_weight(name);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = uploaded_.find(name);
  if (known != uploaded_.end()) return known->second.view();
  if (base_ != nullptr && changed_.count(name) == 0) return base_->weight(name);
  FREEWHEEL_ASSIGN(const Tensor mapped, host_weight(name));
  FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(memory(), mapped.dtype, mapped.shape));
  FREEWHEEL_TRY(memory().upload(buffer.view().data, mapped.data, mapped.bytes()));
  const Tensor view = buffer.view();
  uploaded_.emplace(name, std::move(buffer));
  changed_.erase(name);
  return view;
}

Result<std::vector<std::int64_t>> Model::token_ids(const std::string& text) {
  const std::optional<TokenizerEntry>& entry = manifest().tokenizer;
  if (!entry) {
    return Status(Code::kRequest, "prompt", "is text, and the bundle has no tokenizer",
                  "build it with --with-text-encoder, or give token ids");
  }
  if (!is_utf8(text) || text.find('\0') != std::string::npos) {
    return Status(Code::kRequest, "prompt", "is no UTF-8 text", "encode it as UTF-8");
  }
  const std::lock_guard<std::mutex> lock(tokenizer_mutex_);
  if (tokenizer_ == nullptr) {
    FREEWHEEL_ASSIGN(const std::string file, bundle_->path(entry->file));
    FREEWHEEL_ASSIGN(tokenizer_, load_tokenizer(file));
  }
  FREEWHEEL_ASSIGN(std::vector<std::int64_t> ids, tokenizer_->ids(text));
  if (entry->unknown && std::count(ids.begin(), ids.end(), *entry->unknown) != 0) {
    return Status(Code::kRequest, "prompt",
                  "holds characters that the bundle's tokenizer graph does not know",
                  "leave them out (emoji, say), or give the prompt's token ids");
  }
  return ids;
}

Result<std::unique_ptr<BoundCall>> Model::bind(const std::string& graph, const Tensors& values,
                                               std::int64_t block, std::size_t expert) {
  FREEWHEEL_ASSIGN(const std::shared_ptr<Engine> engine, this->engine(graph));
  const GraphEntry& entry = manifest().graphs.at(graph);
  Tensors bindings;
  for (const auto* names : {&entry.inputs, &entry.outputs}) {
    for (const auto& [name, io] : *names) {
      const auto found = values.find(name);
      if (found != values.end()) bindings[name] = found->second;
    }
  }
  const auto& experts = manifest().experts;
  const std::string prefix = expert < experts.size() ? experts[expert].prefix : std::string();
  std::map<std::string, std::string> weights;
  for (const auto& [name, pattern] : entry.weights) {
    weights[name] = prefix + weight_name(pattern, block);
  }
  if (offloaded_ != nullptr && is_template(entry)) {
    std::map<std::string, std::string> patterns;
    for (const auto& [name, pattern] : entry.weights) patterns[name] = prefix + pattern;
    return offloaded_->bind(*engine, std::move(bindings), patterns, weights, block);
  }
  for (const auto& [name, tensor] : weights) {
    FREEWHEEL_ASSIGN(bindings[name], weight(tensor));
  }
  return engine->bind(bindings);
}

}  // namespace freewheel

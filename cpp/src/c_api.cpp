// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "freewheel/codec.h"
#include "freewheel/freewheel.h"
#include "freewheel/sampler.h"
#include "freewheel/session.h"
#include "freewheel/settings.h"
#include "try.h"

struct freewheel_model {
  std::shared_ptr<freewheel::Model> model;
  std::string error, text;
};

struct freewheel_session {
  std::unique_ptr<freewheel::Session> session;
  std::string error, text;
};

namespace {

using freewheel::Code;
using freewheel::Status;

/// Copies as much of an options struct as its caller knows; what it does not know stays zero.
template <typename T>
T known_part(const T* options) {
  T known{};
  if (options == nullptr) return known;
  const std::size_t size = options->struct_size < sizeof(T) ? options->struct_size : sizeof(T);
  std::memcpy(&known, options, size);
  return known;
}

/// Runs a function that returns a Status; keeps its message; lets no exception out.
template <typename Function>
freewheel_status guarded(std::string& error, const Function& function) noexcept {
  try {
    error.clear();
    const Status status = function();
    if (status.ok()) return FREEWHEEL_OK;
    error = status.message();
    return static_cast<freewheel_status>(status.code());
  } catch (const std::bad_alloc&) {
    error.clear();  // allocates nothing
    return FREEWHEEL_FAILED;
  } catch (const std::exception& fault) {
    try {
      error = std::string("libfreewheel: ") + fault.what() + "; report this";
    } catch (...) {
    }
    return FREEWHEEL_INTERNAL;
  } catch (...) {
    return FREEWHEEL_INTERNAL;
  }
}

const char* text_or_empty(const char* text) { return text == nullptr ? "" : text; }

Status missing(const char* what) {
  return Status(Code::kRequest, what, "is NULL or misses its size", "see freewheel.h");
}

freewheel::Result<freewheel::Shape> shape_of(const char* where, const int64_t* sizes,
                                             int32_t rank) {
  freewheel::Shape shape;
  if (sizes == nullptr || rank < 1 || rank > freewheel::Shape::kMaxRank) return missing(where);
  std::int64_t elements = 1;
  for (int32_t axis = 0; axis < rank; ++axis) {
    if (sizes[axis] <= 0 || elements > (std::int64_t{1} << 40) / sizes[axis]) {
      return Status(Code::kRequest, where, "has an absurd shape", "give sizes above 0");
    }
    elements *= sizes[axis];
    shape.push_back(sizes[axis]);
  }
  return shape;
}

/// Host memory as a tensor; const is cast away, and nothing writes to inputs.
freewheel::Tensor view_of(const float* data, const freewheel::Shape& shape) {
  return {const_cast<float*>(data), freewheel::DType::kFloat32, shape};
}

/// Reads what a caller asks for.
freewheel::Result<freewheel::Request> request_of(const freewheel_run_options& options) {
  freewheel::Request request;
  request.cache = text_or_empty(options.cache);
  request.sampler = text_or_empty(options.sampler);
  if (options.steps != 0) request.steps = options.steps;
  if (!std::isnan(options.guidance_scale)) request.guidance_scale = options.guidance_scale;
  if (options.guidance_scale_2 != 0.0) request.guidance_scale_2 = options.guidance_scale_2;
  if (options.flow_shift != 0.0) request.flow_shift = options.flow_shift;
  if (options.has_seed != 0) request.seed = options.seed;
  request.force = options.force != 0;
  request.lora = text_or_empty(options.lora);
  if (options.latents == nullptr) return missing("latents");
  FREEWHEEL_ASSIGN(const freewheel::Shape shape,
                   shape_of("latents", options.latents_shape, options.latents_rank));
  const bool is_drawn = options.has_seed != 0 || options.has_config_seed != 0;
  request.latents = view_of(is_drawn ? nullptr : options.latents, shape);
  if (options.condition != nullptr) {
    if (options.condition_channels < 1) return missing("condition_channels");
    freewheel::Shape whole;
    for (int axis = 0; axis < shape.rank(); ++axis) {
      whole.push_back(axis == 1 ? options.condition_channels : shape[axis]);
    }
    request.condition = view_of(options.condition, whole);
  }
  if (options.beside_count > 0 && options.beside == nullptr) return missing("beside");
  for (int32_t i = 0; i < options.beside_count; ++i) {
    const freewheel_beside& one = options.beside[i];
    if (one.name == nullptr || one.latents == nullptr) return missing("beside");
    FREEWHEEL_ASSIGN(const freewheel::Shape sizes, shape_of(one.name, one.shape, one.rank));
    freewheel::Beside& asked = request.beside[one.name];
    asked.latents = view_of(is_drawn ? nullptr : one.latents, sizes);
    if (one.guidance_scale != 0.0) asked.guidance_scale = one.guidance_scale;
  }
  if (options.prompt_count > 0 && options.prompts == nullptr) return missing("prompts");
  for (int32_t i = 0; i < options.prompt_count; ++i) {
    const freewheel_prompt& prompt = options.prompts[i];
    if (prompt.branch == nullptr || prompt.input == nullptr || prompt.data == nullptr) {
      return missing("prompt");
    }
    FREEWHEEL_ASSIGN(const freewheel::Shape sizes, shape_of("prompt", prompt.shape, prompt.rank));
    request.prompts[prompt.branch][prompt.input] = view_of(prompt.data, sizes);
  }
  if (options.prompt != nullptr) request.texts["cond"] = options.prompt;
  if (options.negative_prompt != nullptr) request.texts["uncond"] = options.negative_prompt;
  if (options.parameter_count > 0 && options.parameters == nullptr) return missing("parameters");
  for (int32_t i = 0; i < options.parameter_count; ++i) {
    const freewheel_parameter& parameter = options.parameters[i];
    if (parameter.name == nullptr) return missing("parameter");
    request.overrides.emplace_back(parameter.name, std::string(text_or_empty(parameter.value)));
  }
  return request;
}

/// Length to which a config pads prompts.
freewheel::Result<std::int64_t> text_tokens(const freewheel::Model& model, const char* cache) {
  FREEWHEEL_ASSIGN(const freewheel::ConfigEntry config,
                   freewheel::find_config(model.manifest(), text_or_empty(cache)));
  return config.generation.text_tokens;
}

Status encode(freewheel::Model& model, const char* cache, const char* text,
              const int64_t* token_ids, int64_t count, float* states) {
  FREEWHEEL_ASSIGN(const std::int64_t length, text_tokens(model, cache));
  std::vector<std::int64_t> ids;
  if (text != nullptr) {
    FREEWHEEL_ASSIGN(ids, model.token_ids(text));
  } else {
    if (token_ids == nullptr || count < 1) return missing("text and token_ids");
    ids.assign(token_ids, token_ids + count);
  }
  FREEWHEEL_ASSIGN(const freewheel::Buffer encoded, freewheel::encode_tokens(model, ids, length));
  std::memcpy(states, encoded.view().data, encoded.view().bytes());
  return {};
}

Status run(freewheel::Session& session, const freewheel_run_options& options) {
  if (options.has_seed != 0 && options.has_config_seed != 0) {
    return Status(Code::kRequest, "seed", "is given, and the config's is asked for",
                  "set one of has_seed and has_config_seed");
  }
  FREEWHEEL_ASSIGN(const freewheel::Request request, request_of(options));
  FREEWHEEL_ASSIGN(freewheel::PreparedRun prepared,
                   freewheel::prepare_run(session.model(), request));
  if (options.progress != nullptr) {
    prepared.run.on_branch_step = [&](const freewheel::BranchEvent& event) {
      const std::string branch(event.branch);  // short: within the string itself
      const freewheel_progress progress = {
          sizeof progress,        branch.c_str(), event.step_index, event.steps,
          event.computed ? 1 : 0, event.distance, event.seconds};
      if (options.progress(&progress, options.user) != 0) session.cancel();
    };
  }
  FREEWHEEL_TRY(session.run(prepared.run));
  const freewheel::Tensor& latents = prepared.run.latents;
  std::memcpy(options.latents, latents.data, latents.bytes());
  for (int32_t i = 0; i < options.beside_count; ++i) {
    const freewheel::Tensor& sampled = prepared.run.beside.at(options.beside[i].name).latents;
    std::memcpy(options.beside[i].latents, sampled.data, sampled.bytes());
  }
  return {};
}

}  // namespace

extern "C" {

const char* freewheel_status_name(freewheel_status status) noexcept {
  return freewheel::code_name(static_cast<Code>(status));
}

const char* freewheel_version(void) noexcept { return FREEWHEEL_VERSION; }

freewheel_status freewheel_model_create(const char* folder, const freewheel_model_options* options,
                                        freewheel_model** model) noexcept {
  if (model == nullptr) return FREEWHEEL_REQUEST;
  *model = new (std::nothrow) freewheel_model;
  if (*model == nullptr) return FREEWHEEL_FAILED;
  return guarded((*model)->error, [&]() -> Status {
    if (folder == nullptr) return missing("folder");
    if (options != nullptr && options->struct_size < sizeof(std::size_t)) {
      return missing("options");
    }
    const freewheel_model_options known = known_part(options);
    freewheel::ModelOptions wanted;
    wanted.backend = text_or_empty(known.backend);
    wanted.backend_options.threads = known.threads;
    wanted.backend_options.device = known.device;
    wanted.backend_options.cuda_graphs = known.cuda_graphs != 0;
    wanted.offload = known.offload != 0;
    wanted.allow_compile = known.allow_compile != 0;
    wanted.check_finite = known.skip_finite_check == 0;
    wanted.lora_folder = text_or_empty(known.lora_folder);
    FREEWHEEL_ASSIGN((*model)->model, freewheel::Model::load(folder, wanted));
    return {};
  });
}

void freewheel_model_destroy(freewheel_model* model) noexcept { delete model; }

const char* freewheel_model_last_error(const freewheel_model* model) noexcept {
  return model == nullptr ? "" : model->error.c_str();
}

freewheel_status freewheel_model_describe(freewheel_model* model, const char** json) noexcept {
  if (model == nullptr || json == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    model->text = freewheel::describe(model->model->manifest(), model->model->backend().name());
    *json = model->text.c_str();
    return {};
  });
}

freewheel_status freewheel_model_latents_shape(freewheel_model* model, const char* cache,
                                               int64_t frames, int64_t height, int64_t width,
                                               int64_t* shape, int32_t* rank) noexcept {
  if (model == nullptr || shape == nullptr || rank == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    freewheel::Request request;
    request.cache = text_or_empty(cache);
    if (frames != 0) request.frames = frames;
    if (height != 0) request.height = height;
    if (width != 0) request.width = width;
    FREEWHEEL_ASSIGN(const freewheel::Shape found,
                     freewheel::requested_shape(model->model->manifest(), request));
    std::copy(found.begin(), found.end(), shape);
    *rank = found.rank();
    return {};
  });
}

freewheel_status freewheel_model_text_shape(freewheel_model* model, const char* cache,
                                            int64_t shape[3]) noexcept {
  if (model == nullptr || shape == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    FREEWHEEL_ASSIGN(const std::int64_t tokens, text_tokens(*model->model, cache));
    FREEWHEEL_ASSIGN(const freewheel::Shape found,
                     freewheel::text_shape(model->model->manifest(), tokens));
    std::copy(found.begin(), found.end(), shape);
    return {};
  });
}

freewheel_status freewheel_model_encode(freewheel_model* model, const char* cache, const char* text,
                                        const int64_t* token_ids, int64_t count,
                                        float* states) noexcept {
  if (model == nullptr || states == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    return encode(*model->model, cache, text, token_ids, count, states);
  });
}

freewheel_status freewheel_model_frames_shape(freewheel_model* model, const int64_t* latents_shape,
                                              int32_t latents_rank, int64_t shape[5]) noexcept {
  if (model == nullptr || shape == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    FREEWHEEL_ASSIGN(const freewheel::Shape latents,
                     shape_of("latents", latents_shape, latents_rank));
    FREEWHEEL_ASSIGN(const freewheel::Shape found,
                     freewheel::frames_shape(model->model->manifest(), latents));
    std::copy(found.begin(), found.end(), shape);
    return {};
  });
}

freewheel_status freewheel_model_decode(freewheel_model* model, const float* latents,
                                        const int64_t* latents_shape, int32_t latents_rank,
                                        uint8_t* frames) noexcept {
  if (model == nullptr || latents == nullptr || frames == nullptr) return FREEWHEEL_REQUEST;
  return guarded(model->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    FREEWHEEL_ASSIGN(const freewheel::Shape shape,
                     shape_of("latents", latents_shape, latents_rank));
    FREEWHEEL_ASSIGN(const freewheel::Buffer decoded,
                     freewheel::decode_latents(*model->model, view_of(latents, shape)));
    std::memcpy(frames, decoded.view().data, decoded.view().bytes());
    return {};
  });
}

freewheel_status freewheel_session_create(freewheel_model* model,
                                          freewheel_session** session) noexcept {
  if (model == nullptr || session == nullptr) return FREEWHEEL_REQUEST;
  *session = new (std::nothrow) freewheel_session;
  if (*session == nullptr) return FREEWHEEL_FAILED;
  return guarded((*session)->error, [&]() -> Status {
    if (model->model == nullptr) return missing("model");
    FREEWHEEL_ASSIGN((*session)->session, freewheel::Session::create(model->model));
    return {};
  });
}

void freewheel_session_destroy(freewheel_session* session) noexcept { delete session; }

const char* freewheel_session_last_error(const freewheel_session* session) noexcept {
  return session == nullptr ? "" : session->error.c_str();
}

void freewheel_session_cancel(freewheel_session* session) noexcept {
  if (session != nullptr && session->session != nullptr) session->session->cancel();
}

freewheel_status freewheel_session_run(freewheel_session* session,
                                       const freewheel_run_options* options) noexcept {
  if (session == nullptr) return FREEWHEEL_REQUEST;
  return guarded(session->error, [&]() -> Status {
    if (session->session == nullptr) return missing("session");
    if (options == nullptr || options->struct_size < offsetof(freewheel_run_options, steps)) {
      return missing("options");
    }
    return run(*session->session, known_part(options));
  });
}

freewheel_status freewheel_session_statistics(freewheel_session* session,
                                              const char** json) noexcept {
  if (session == nullptr || json == nullptr) return FREEWHEEL_REQUEST;
  return guarded(session->error, [&]() -> Status {
    if (session->session == nullptr) return missing("session");
    session->text = session->session->statistics().json();
    *json = session->text.c_str();
    return {};
  });
}

void freewheel_noise(uint64_t seed, float* out, int64_t count) noexcept {
  if (out != nullptr && count > 0) freewheel::gaussian_noise(seed, out, count);
}

}  // extern "C"

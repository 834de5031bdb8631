/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FREEWHEEL_FREEWHEEL_H_
#define FREEWHEEL_FREEWHEEL_H_

/* The C ABI of libfreewheel.
 *
 * Handles are opaque and are made and destroyed in pairs. Option structs begin with their own size,
 * so that fields may be added at their ends: set `struct_size = sizeof(...)` and zero the rest.
 * No function throws. A model may be used by any number of threads; a session by one at a time,
 * except `freewheel_session_cancel`. Strings and pointers that functions return belong to the
 * handle and are valid until its next call.
 */

#include <stddef.h>
#include <stdint.h>

#include "freewheel/version.h"

#ifdef __cplusplus
#define FREEWHEEL_NOEXCEPT noexcept
extern "C" {
#else
#define FREEWHEEL_NOEXCEPT
#endif

/* Values never change. */
typedef enum freewheel_status {
  FREEWHEEL_OK = 0,
  FREEWHEEL_FAILED = 1,    /* something failed while running */
  FREEWHEEL_BUNDLE = 2,    /* the bundle can't be read, or is not what its manifest says */
  FREEWHEEL_CONFIG = 3,    /* a policy name, parameter or signal is wrong */
  FREEWHEEL_REQUEST = 4,   /* a run was asked for something that the bundle can't do */
  FREEWHEEL_BACKEND = 5,   /* the wanted backend can't be used here */
  FREEWHEEL_OUTPUT = 6,    /* a file can't be written */
  FREEWHEEL_CANCELLED = 7, /* the run was cancelled */
  FREEWHEEL_INTERNAL = 8,  /* a bug of this library */
  FREEWHEEL_NOT_FINITE = 9 /* the run made values that are not finite */
} freewheel_status;

/* "ok", "bundle", "config", ...; "unknown" for other values. */
const char* freewheel_status_name(freewheel_status status) FREEWHEEL_NOEXCEPT;

/* Version of the library, as `FREEWHEEL_VERSION` is that of the header. */
const char* freewheel_version(void) FREEWHEEL_NOEXCEPT;

/* A loaded bundle: engines and weights, shared by sessions. */
typedef struct freewheel_model freewheel_model;

/* Buffers of one run at a time. */
typedef struct freewheel_session freewheel_session;

typedef struct freewheel_model_options {
  size_t struct_size;
  const char* backend;       /* NULL takes the first that the bundle and this library have */
  int32_t threads;           /* CPU threads of one engine call; 0 takes every core */
  int32_t device;            /* index of the GPU */
  int32_t allow_compile;     /* not 0: engines that don't fit this machine are compiled anew */
  int32_t skip_finite_check; /* not 0: runs go on with values that are not finite */
  int32_t cuda_graphs;       /* not 0: TensorRT replays each engine call as one CUDA graph */
  int32_t offload;           /* not 0: blocks' weights stay in host memory, two on the device */
  const char* lora_folder;   /* the only folder that runs may name LoRAs of; NULL takes none */
} freewheel_model_options;

/* Opens the bundle in `folder`. `options` may be NULL. On failure `*model` is a handle that is good
 * for `freewheel_model_last_error` and `freewheel_model_destroy` only (NULL when out of memory). */
freewheel_status freewheel_model_create(const char* folder, const freewheel_model_options* options,
                                        freewheel_model** model) FREEWHEEL_NOEXCEPT;

/* Sessions keep what they need of the model: it may be destroyed before them. NULL is allowed. */
void freewheel_model_destroy(freewheel_model* model) FREEWHEEL_NOEXCEPT;

/* "where: what; what to do" of the handle's last failure; "" when there was none. */
const char* freewheel_model_last_error(const freewheel_model* model) FREEWHEEL_NOEXCEPT;

/* JSON: policies with their parameters, configs, inputs, samplers, backend. */
freewheel_status freewheel_model_describe(freewheel_model* model,
                                          const char** json) FREEWHEEL_NOEXCEPT;

/* The shape of one video's latents, for `freewheel_run_options`: 5 sizes of most models, 8 at most.
 * `cache` as there; a size of 0 takes the config's. */
freewheel_status freewheel_model_latents_shape(freewheel_model* model, const char* cache,
                                               int64_t frames, int64_t height, int64_t width,
                                               int64_t* shape, int32_t* rank) FREEWHEEL_NOEXCEPT;

/* The shape of one prompt's text states: 1, the config's text length, the width. `cache` as in
 * `freewheel_run_options`. The bundle needs its text encoder, here and below. */
freewheel_status freewheel_model_text_shape(freewheel_model* model, const char* cache,
                                            int64_t shape[3]) FREEWHEEL_NOEXCEPT;

/* Encodes a prompt: UTF-8 `text`, or where that is NULL `count` token ids. `states` gets float32 of
 * `freewheel_model_text_shape`, zero behind the prompt. Runs take texts themselves: this is for
 * prompts that are used again. */
freewheel_status freewheel_model_encode(freewheel_model* model, const char* cache, const char* text,
                                        const int64_t* token_ids, int64_t count,
                                        float* states) FREEWHEEL_NOEXCEPT;

/* The shape of the frames that latents of a shape decode to: 1, frames, height, width, 3. The
 * bundle needs its VAE, here and below. */
freewheel_status freewheel_model_frames_shape(freewheel_model* model, const int64_t* latents_shape,
                                              int32_t latents_rank,
                                              int64_t shape[5]) FREEWHEEL_NOEXCEPT;

/* Decodes latents, as a run leaves them. `frames` gets uint8 RGB of `freewheel_model_frames_shape`.
 */
freewheel_status freewheel_model_decode(freewheel_model* model, const float* latents,
                                        const int64_t* latents_shape, int32_t latents_rank,
                                        uint8_t* frames) FREEWHEEL_NOEXCEPT;

/* As with models, a failed creation leaves a handle that tells why. */
freewheel_status freewheel_session_create(freewheel_model* model,
                                          freewheel_session** session) FREEWHEEL_NOEXCEPT;
void freewheel_session_destroy(freewheel_session* session) FREEWHEEL_NOEXCEPT;
const char* freewheel_session_last_error(const freewheel_session* session) FREEWHEEL_NOEXCEPT;

/* Stops the run in progress, if any, before its next engine call. From any thread. */
void freewheel_session_cancel(freewheel_session* session) FREEWHEEL_NOEXCEPT;

/* One per-prompt input of one branch: host float32, contiguous; whole numbers where the bundle
 * takes integers, 0 and 1 where it takes truth values. */
typedef struct freewheel_prompt {
  const char* branch; /* "cond" or "uncond" */
  const char* input;  /* "text_states", ... */
  const float* data;
  const int64_t* shape;
  int32_t rank;
} freewheel_prompt;

/* Latents that a model samples beside the first, as the sound of a video. */
typedef struct freewheel_beside {
  const char* name; /* "audio_latents" */
  float* latents;   /* noise in, result out, as `latents` of `freewheel_run_options` */
  const int64_t* shape;
  int32_t rank;
  double guidance_scale; /* 0 takes that of the first */
} freewheel_beside;

/* An override of the cache setting: a parameter of the policy, "first_exact", "last_exact",
 * "max_consecutive", "max_reused", "exact_steps", "signal", "deadline" (seconds that the denoise
 * steps may take: a solved config computes as many steps as fit) or "min_psnr" (dB against the
 * uncached run that nine runs in ten keep: a solved config computes the fewest steps that do). */
typedef struct freewheel_parameter {
  const char* name;
  const char* value; /* as JSON: "0.2", "true", "[1, 0.5]" (also "1,0.5"); a bare word is text */
} freewheel_parameter;

/* One step of one branch, as it ends. */
typedef struct freewheel_progress {
  size_t struct_size;
  const char* branch;
  int64_t step_index;
  int64_t steps;
  int32_t computed; /* 1 computed, 0 reused */
  double distance;  /* NaN where the policy has none */
  double seconds;
} freewheel_progress;

/* Return 0 to go on, anything else to cancel the run. Called on the thread that runs. */
typedef int (*freewheel_progress_function)(const freewheel_progress* progress, void* user);

typedef struct freewheel_run_options {
  size_t struct_size;
  float* latents; /* [batch, channels, frames, height, width]: noise in, result out */
  const int64_t* latents_shape;
  int32_t latents_rank;
  int32_t prompt_count;
  const freewheel_prompt* prompts;
  int64_t steps;         /* 0 takes the config's */
  double guidance_scale; /* 1 or less runs "cond" alone; NaN takes the config's */
  double flow_shift;     /* 0 takes the config's */
  const char* sampler;   /* NULL takes the pipeline's own */
  const char* cache;     /* a config or policy of the bundle; NULL takes the default config */
  const freewheel_parameter* parameters;
  int32_t parameter_count;
  int32_t has_seed; /* not 0: latents are overwritten with noise of `seed` first */
  uint64_t seed;
  freewheel_progress_function progress; /* or NULL */
  void* user;
  const float* condition; /* further channels at every step, or NULL */
  int64_t condition_channels;
  /* Of bundles with two experts: the guidance scale from the second one's first step on; 0 takes
   * `guidance_scale`. */
  double guidance_scale_2;
  int32_t has_config_seed; /* not 0: as `has_seed`, with the config's seed */
  /* Not 0: a config may be run at a size that is 20 times the bundle's own or more. */
  int32_t force;
  /* Prompts as UTF-8 text, in place of their text states; or NULL. Where guidance needs a negative
   * prompt beside a `prompt` and none is given, it is empty. */
  const char* prompt;
  const char* negative_prompt;
  /* LoRAs of `lora_folder` that `freewheel lora` wrote, as "name:0.8,other"; NULL is none. The
   * session keeps the weights that they change until a run with others, or with none. */
  const char* lora;
  /* Every other step input that `freewheel_model_describe` lists beside "latents". */
  const freewheel_beside* beside;
  int32_t beside_count;
} freewheel_run_options;

/* Runs the whole denoise loop. The latents are left as they were where it fails. */
freewheel_status freewheel_session_run(freewheel_session* session,
                                       const freewheel_run_options* options) FREEWHEEL_NOEXCEPT;

/* JSON of the last run: decisions, distances, seconds, estimated and ideal speedup, warnings. */
freewheel_status freewheel_session_statistics(freewheel_session* session,
                                              const char** json) FREEWHEEL_NOEXCEPT;

/* Fills with standard normal noise, the same as runs with a seed start from. */
void freewheel_noise(uint64_t seed, float* out, int64_t count) FREEWHEEL_NOEXCEPT;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FREEWHEEL_FREEWHEEL_H_ */

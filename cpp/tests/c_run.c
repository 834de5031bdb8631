/* SPDX-License-Identifier: Apache-2.0 */
/* A C program around the C ABI that leaves everything to the bundle: one prompt, no value of its
 * own.
 *
 *   c_run BUNDLE THREADS COND UNCOND TOKENS WIDTH NOISE OUT CACHE [KEY=VALUE ...]
 *
 * COND and UNCOND hold raw float32 text states [TOKENS, WIDTH]; NOISE and OUT get raw float32
 * latents. CACHE may be empty. The keys lora_folder and lora are options of their own; any other
 * overrides a parameter. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "freewheel/freewheel.h"

enum { kMaxOverrides = 16 };

static float* read_floats(const char* path, size_t count) {
  float* values = malloc(count * sizeof *values);
  FILE* file = fopen(path, "rb");
  if (values == NULL || file == NULL || fread(values, sizeof *values, count, file) != count) {
    fprintf(stderr, "%s: can't be read\n", path);
    exit(2);
  }
  fclose(file);
  return values;
}

static void write_floats(const char* path, const float* values, size_t count) {
  FILE* file = fopen(path, "wb");
  if (file == NULL || fwrite(values, sizeof *values, count, file) != count || fclose(file) != 0) {
    fprintf(stderr, "%s: can't be written\n", path);
    exit(2);
  }
}

int main(int argc, char** argv) {
  if (argc < 10 || argc > 10 + kMaxOverrides) return 2;
  freewheel_model_options options = {0};
  options.struct_size = sizeof options;
  options.threads = atoi(argv[2]);
  freewheel_parameter parameters[kMaxOverrides];
  freewheel_run_options run = {0};
  run.struct_size = sizeof run;
  run.cache = argv[9];
  for (int i = 10; i < argc; ++i) {
    char* value = strchr(argv[i], '=');
    if (value == NULL) return 2;
    *value++ = '\0';
    if (strcmp(argv[i], "lora_folder") == 0) {
      options.lora_folder = value;
    } else if (strcmp(argv[i], "lora") == 0) {
      run.lora = value;
    } else {
      parameters[run.parameter_count].name = argv[i];
      parameters[run.parameter_count++].value = value;
    }
  }
  freewheel_model* model = NULL;
  freewheel_session* session = NULL;
  if (freewheel_model_create(argv[1], &options, &model) != FREEWHEEL_OK ||
      freewheel_session_create(model, &session) != FREEWHEEL_OK) {
    fprintf(stderr, "%s\n", freewheel_model_last_error(model));
    return 1;
  }
  const int64_t text_shape[3] = {1, atoll(argv[5]), atoll(argv[6])};
  const size_t text_count = (size_t)(text_shape[1] * text_shape[2]);
  float* states[2] = {read_floats(argv[3], text_count), read_floats(argv[4], text_count)};
  const freewheel_prompt prompts[2] = {{"cond", "text_states", states[0], text_shape, 3},
                                       {"uncond", "text_states", states[1], text_shape, 3}};
  int64_t shape[8];
  if (freewheel_model_latents_shape(model, run.cache, 0, 0, 0, shape, &run.latents_rank) !=
      FREEWHEEL_OK) {
    fprintf(stderr, "%s\n", freewheel_model_last_error(model));
    return 1;
  }
  size_t count = 1;
  for (int axis = 0; axis < run.latents_rank; ++axis) count *= (size_t)shape[axis];
  float* latents = calloc(count, sizeof *latents);
  if (latents == NULL) return 1;
  run.latents = latents;
  run.latents_shape = shape;
  run.prompts = prompts;
  run.prompt_count = 2;
  run.parameters = parameters;
  run.guidance_scale = NAN;
  run.has_config_seed = 1;
  if (freewheel_session_run(session, &run) != FREEWHEEL_OK) {
    fprintf(stderr, "%s\n", freewheel_session_last_error(session));
    return 1;
  }
  write_floats(argv[8], latents, count);
  /* The noise of seed 42, what `build` resolves where no config names one. */
  freewheel_noise(42, latents, (int64_t)count);
  write_floats(argv[7], latents, count);
  free(latents);
  free(states[0]);
  free(states[1]);
  freewheel_session_destroy(session);
  freewheel_model_destroy(model);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
/// freewheel-run: run a bundle from the command line, without Python.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "freewheel/codec.h"
#include "freewheel/files.h"
#include "freewheel/freewheel.h"
#include "freewheel/session.h"
#include "outcome.h"
#include "result_file.h"

namespace {

using freewheel::Buffer;
using freewheel::Code;
using freewheel::Result;
using freewheel::Shape;
using freewheel::Status;
using freewheel::Tensor;
using freewheel::Tensors;

std::atomic<bool> interrupted{false};

extern "C" void on_interrupt(int) { interrupted.store(true); }

struct Options {
  std::string bundle, out, backend, cache, sampler, embeddings, negative, latents, condition;
  std::string token_ids, negative_token_ids, deadline, min_psnr, lora_folder;
  std::optional<std::string> prompt, negative_prompt;
  std::vector<std::string> settings, loras, guidance_of;
  std::optional<std::int64_t> steps, seed, frames, height, width;
  std::optional<double> guidance, guidance_2, shift;
  int threads = 0;
  int device = 0;
  int fps = 8;
  bool cuda_graphs = false;
  bool offload = false;
  bool force = false;
  bool json = false, allow_compile = false, check_finite = true, quiet = false;
};

/// Host tensors of one file: the mapping or the buffer that holds them, and their names.
struct Loaded {
  freewheel::SafetensorsFile file;
  Buffer buffer;
  Tensors tensors;
};

bool ends_with(const std::string& text, const char* end) {
  const std::string tail = end;
  return text.size() >= tail.size() &&
         text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

/// Loads a .npy file as one tensor named `name`, or a .safetensors file with all its names.
Result<Loaded> load(const std::string& path, const std::string& name) {
  Loaded loaded;
  if (ends_with(path, ".npy")) {
    auto buffer = freewheel::read_npy(path);
    if (!buffer.ok()) return std::move(buffer).status();
    loaded.buffer = std::move(buffer).value();
    loaded.tensors[name] = loaded.buffer.view();
    return loaded;
  }
  auto file = freewheel::SafetensorsFile::open(path);
  if (!file.ok()) return std::move(file).status();
  loaded.file = std::move(file).value();
  loaded.tensors = loaded.file.tensors;
  if (loaded.tensors.size() == 1 && loaded.tensors.count(name) == 0) {
    loaded.tensors[name] = loaded.tensors.begin()->second;
  }
  return loaded;
}

/// Gives [tokens, width] its batch axis.
Tensor batched(Tensor tensor, int rank) {
  if (tensor.shape.rank() + 1 != rank) return tensor;
  Shape shape{1};
  for (std::int64_t size : tensor.shape) shape.push_back(size);
  tensor.shape = shape;
  return tensor;
}

/// Takes the per-prompt inputs of `branch`: named "cond.text_states" or plainly "text_states".
void take_prompt(const Tensors& found, const freewheel::Manifest& manifest,
                 const std::string& branch, bool plain, std::map<std::string, Tensors>& prompts) {
  for (const auto& [name, entry] : manifest.inputs) {
    if (entry.runs != "prompt") continue;
    const int rank = static_cast<int>(entry.shape.size());
    for (const std::string& key : {branch + "." + name, plain ? name : std::string()}) {
      const auto tensor = found.find(key);
      if (tensor != found.end()) prompts[branch][name] = batched(tensor->second, rank);
    }
  }
}

Result<std::vector<std::int64_t>> ids_of(const std::string& text) {
  std::vector<std::int64_t> ids;
  for (const std::string& part : CLI::detail::split(text, ',')) {
    char* end = nullptr;
    ids.push_back(std::strtoll(part.c_str(), &end, 10));
    if (part.empty() || *end != '\0') {
      return Status(Code::kRequest, "token ids", "'" + part + "' is no number", "give 5,17,1");
    }
  }
  return ids;
}

/// Reads `--set key=value`, as often as it was given.
Status read_overrides(const Options& options, freewheel::Request& request) {
  for (const std::string& setting : options.settings) {
    const std::size_t at = setting.find('=');
    if (at == std::string::npos) {
      return Status(Code::kConfig, "--set " + setting, "is no key=value",
                    "give --set threshold=0.2");
    }
    request.overrides.emplace_back(setting.substr(0, at), setting.substr(at + 1));
  }
  if (!options.deadline.empty()) request.overrides.emplace_back("deadline", options.deadline);
  if (!options.min_psnr.empty()) request.overrides.emplace_back("min_psnr", options.min_psnr);
  return {};
}

/// Loads the one tensor of a file that has this name, if a file was given.
Status read_named(const std::string& path, const std::string& name, std::vector<Loaded>& files,
                  Tensor& target) {
  if (path.empty()) return {};
  auto loaded = load(path, name);
  if (!loaded.ok()) return std::move(loaded).status();
  const auto found = loaded->tensors.find(name);
  if (found == loaded->tensors.end()) {
    return Status(Code::kRequest, path, "holds no tensor '" + name + "'", "name it so");
  }
  target = found->second;
  files.push_back(std::move(loaded).value());
  return {};
}

/// Reads the start noise of all that is sampled: a .npy holds that of `latents`.
Status read_latents(const std::string& path, const freewheel::Manifest& manifest,
                    std::vector<Loaded>& files, freewheel::Request& request) {
  Status status = read_named(path, "latents", files, request.latents);
  if (!status.ok() || path.empty()) return status;
  for (const std::string& name : manifest.latents()) {
    const auto found = files.back().tensors.find(name);
    if (name == "latents" || found == files.back().tensors.end()) continue;
    request.beside[name].latents = found->second;
  }
  return {};
}

/// Reads `--guidance-of name=scale`, as often as it was given.
Status read_guidance(const std::vector<std::string>& given, freewheel::Request& request) {
  for (const std::string& one : given) {
    const std::size_t at = one.find('=');
    char* end = nullptr;
    const double scale = at == std::string::npos ? 0.0 : std::strtod(one.c_str() + at + 1, &end);
    if (end == nullptr || *end != '\0' || at + 1 == one.size()) {
      return Status(Code::kRequest, "--guidance-of " + one, "is no name=number",
                    "give --guidance-of audio_latents=7");
    }
    request.beside[one.substr(0, at)].guidance_scale = scale;
  }
  return {};
}

/// Reads the prompts' texts, files and token ids.
Status read_prompts(const Options& options, const freewheel::Manifest& manifest,
                    std::vector<Loaded>& files, freewheel::Request& request) {
  const std::string name = freewheel::text_input(manifest);
  const std::string* embeddings[] = {&options.embeddings, &options.negative};
  const std::string* id_lists[] = {&options.token_ids, &options.negative_token_ids};
  const std::optional<std::string>* texts[] = {&options.prompt, &options.negative_prompt};
  for (std::size_t side = 0; side < 2; ++side) {
    const std::string branch = freewheel::kSides[side];
    if (!embeddings[side]->empty()) {
      auto loaded = load(*embeddings[side], name);
      if (!loaded.ok()) return std::move(loaded).status();
      take_prompt(loaded->tensors, manifest, branch, true, request.prompts);
      if (side == 0) take_prompt(loaded->tensors, manifest, "uncond", false, request.prompts);
      files.push_back(std::move(loaded).value());
    }
    if (*texts[side]) request.texts[branch] = **texts[side];
    if (id_lists[side]->empty()) continue;
    auto ids = ids_of(*id_lists[side]);
    if (!ids.ok()) return std::move(ids).status();
    request.token_ids[branch] = std::move(ids).value();
  }
  return {};
}

/// Reads what a run is asked for, files and all.
/// @param files Get what the request points into.
Status read_request(const Options& options, const freewheel::Manifest& manifest,
                    std::vector<Loaded>& files, freewheel::Request& request) {
  request.cache = options.cache;
  request.sampler = options.sampler;
  request.steps = options.steps;
  request.frames = options.frames;
  request.height = options.height;
  request.width = options.width;
  request.guidance_scale = options.guidance;
  request.guidance_scale_2 = options.guidance_2;
  request.flow_shift = options.shift;
  request.force = options.force;
  for (const std::string& lora : options.loras) {
    request.lora += (request.lora.empty() ? "" : ",") + lora;
  }
  Status status = options.seed ? request.set("seed", *options.seed) : Status();
  if (status.ok()) status = read_overrides(options, request);
  if (status.ok()) status = read_latents(options.latents, manifest, files, request);
  if (status.ok()) status = read_guidance(options.guidance_of, request);
  if (status.ok()) status = read_named(options.condition, "condition", files, request.condition);
  if (status.ok()) status = read_prompts(options, manifest, files, request);
  return status;
}

/// Writes latents, or the frames that they decode to.
Status write_result(const ResultFile& out, freewheel::Model& model,
                    const freewheel::RunRequest& run) {
  if (!out.wants_latents()) {
    auto frames = freewheel::decode_latents(model, run.latents);
    return frames.ok() ? out.write({{"frames", frames->view()}}) : std::move(frames).status();
  }
  Tensors results = {{"latents", run.latents}};
  for (const auto& [name, sampled] : run.beside) results[name] = sampled.latents;
  return out.write(results);
}

void show_step(const freewheel::BranchEvent& event, bool is_terminal) {
  std::fprintf(stderr, "%sstep %lld/%lld %-6.*s %s", is_terminal ? "\r" : "",
               static_cast<long long>(event.step_index + 1), static_cast<long long>(event.steps),
               static_cast<int>(event.branch.size()), event.branch.data(),
               event.computed ? "computed" : "reused  ");
  if (std::isfinite(event.distance)) std::fprintf(stderr, "  distance %.4f", event.distance);
  std::fprintf(stderr, "  %.3f s%s", event.seconds, is_terminal ? "   " : "\n");
}

/// Returns the seconds since `began`, and begins anew.
double lap(std::chrono::steady_clock::time_point& began) {
  const auto now = std::chrono::steady_clock::now();
  return std::chrono::duration<double>(now - std::exchange(began, now)).count();
}

Status run(const Options& options, nlohmann::json& report) {
  auto out = ResultFile::create(options.out, options.fps);
  if (!out.ok()) return std::move(out).status();
  Outcome outcome;
  auto clock = std::chrono::steady_clock::now();
  freewheel::ModelOptions model_options;
  model_options.backend = options.backend;
  model_options.backend_options.threads = options.threads;
  model_options.backend_options.device = options.device;
  model_options.backend_options.cuda_graphs = options.cuda_graphs;
  model_options.offload = options.offload;
  model_options.allow_compile = options.allow_compile;
  model_options.check_finite = options.check_finite;
  model_options.lora_folder = options.lora_folder;
  auto model = freewheel::Model::load(options.bundle, model_options);
  if (!model.ok()) return std::move(model).status();
  if (Status status = out->check_holds((*model)->manifest().latents()); !status.ok()) return status;
  auto session = freewheel::Session::create(*model);
  if (!session.ok()) return std::move(session).status();
  outcome.backend = (*model)->backend().name();
  outcome.seconds.load = lap(clock);
  std::vector<Loaded> files;
  freewheel::Request asked;
  Status status = read_request(options, (*model)->manifest(), files, asked);
  if (!status.ok()) return status;
  asked.decodes = !out->wants_latents();
  auto prepared = freewheel::prepare_run(**model, asked);
  if (!prepared.ok()) return std::move(prepared).status();
  freewheel::RunRequest& request = prepared->run;
  for (const std::string& text : request.warnings) std::cerr << "warning: " << text << "\n";
  request.cancelled = &interrupted;
  const bool is_terminal = isatty(STDERR_FILENO) != 0;
  if (!options.quiet) {
    request.on_branch_step = [&](const freewheel::BranchEvent& event) {
      show_step(event, is_terminal);
    };
  }
  outcome.seconds.encode = lap(clock);
  status = (*session)->run(request);
  if (!status.ok()) return status;
  outcome.seconds.denoise = lap(clock);
  status = write_result(*out, **model, request);
  if (!status.ok()) return status;
  outcome.seconds.decode = lap(clock);
  outcome.peak_memory_bytes = peak_memory_bytes();
  const freewheel::RunStatistics& statistics = (*session)->statistics();
  if (!options.quiet) show_outcome(statistics, outcome);
  report = outcome_json(statistics, outcome);
  report["schema_version"] = 1;
  report["out"] = options.out;
  return {};
}

int exit_code(Code code) {
  switch (code) {
    case Code::kOk:
      return 0;
    case Code::kBundle:
    case Code::kConfig:
    case Code::kRequest:
    case Code::kOutput:
      return 3;
    case Code::kBackend:
      return 4;
    case Code::kCancelled:
      return 130;
    case Code::kNotFinite:
      return 5;
    case Code::kInternal:
      return 70;
    case Code::kFailed:
      return 1;
  }
  return 1;
}

/// Prints an object in one line; bytes of a path that are no UTF-8 are replaced.
void print(const nlohmann::json& object) {
  std::cout << object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void print_error(const std::string& code, const std::string& message, const std::string& where,
                 const std::string& hint) {
  const nlohmann::json error = {
      {"code", code}, {"message", message}, {"where", where}, {"hint", hint}};
  print({{"schema_version", 1}, {"error", error}});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Run a Freewheel bundle: a prompt to a video, frames or latents."};
  Options options;
  app.set_version_flag("--version", std::string("freewheel-run ") + freewheel_version());
  app.add_option("bundle", options.bundle, "Folder that 'freewheel build' wrote")->required();
  app.add_option("-o,--out", options.out,
                 ".mp4 (needs ffmpeg), .rgb or a new folder (of PNG) for frames, .safetensors or "
                 ".npy for latents")
      ->required();
  app.add_option("--prompt", options.prompt,
                 "What to show, as text (needs the text encoder and its tokenizer)");
  app.add_option("--negative-prompt", options.negative_prompt,
                 "What not to show; empty beside a --prompt that guidance needs one for");
  app.add_option("--embeddings", options.embeddings,
                 "Prompt embeddings: .npy [tokens, width], or .safetensors with 'text_states' or "
                 "'cond.text_states' and 'uncond.text_states'");
  app.add_option("--negative", options.negative, "Embeddings of the negative prompt");
  app.add_option("--token-ids", options.token_ids,
                 "Prompt as ids, 5,17,1 (needs the text encoder)");
  app.add_option("--negative-token-ids", options.negative_token_ids, "Negative prompt as ids");
  app.add_option("--latents", options.latents,
                 "Start noise from a .npy file, or from a .safetensors file by name");
  app.add_option("--condition", options.condition, "Further channels of every step (from images)");
  app.add_option("--cache", options.cache, "A config or a policy of the bundle");
  app.add_option("--set", options.settings,
                 "key=value: a parameter of the policy, first_exact, exact_steps, signal, ...");
  app.add_option("--lora", options.loras,
                 "name or name:scale: a LoRA of --lora-folder, as 'freewheel lora' writes it");
  app.add_option("--lora-folder", options.lora_folder, "Folder of LoRAs");
  app.add_option("--deadline", options.deadline,
                 "Seconds that the denoise steps may take, 20 or 20s: a solved config computes as "
                 "many steps as fit");
  app.add_option("--min-psnr", options.min_psnr,
                 "dB against the uncached run that nine runs in ten keep: a solved config computes "
                 "the fewest steps that do");
  app.add_option("--steps", options.steps, "Denoise steps");
  app.add_option("--seed", options.seed, "Seed of the start noise");
  app.add_option("--guidance", options.guidance, "Guidance scale; 1 or less runs one branch");
  app.add_option("--guidance-2", options.guidance_2,
                 "Guidance scale of the second expert, where the bundle has two");
  app.add_option("--guidance-of", options.guidance_of,
                 "name=scale: of latents that are sampled beside the first, audio_latents=7");
  app.add_option("--sampler", options.sampler,
                 "unipc, euler, dpmpp_2m, distilled or a list of the bundle's");
  app.add_option("--shift", options.shift, "Flow shift, one that the bundle has tables for");
  app.add_option("--frames", options.frames, "Frames of the video");
  app.add_option("--height", options.height, "Height in pixels");
  app.add_option("--width", options.width, "Width in pixels");
  app.add_option("--fps", options.fps, "Frames per second of a video")->check(CLI::Range(1, 1000));
  app.add_option("--backend", options.backend, "Backend to run on");
  app.add_option("--threads", options.threads, "CPU threads; 0 takes every core")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--device", options.device, "Index of the GPU")->check(CLI::NonNegativeNumber);
  app.add_flag("--cuda-graphs", options.cuda_graphs,
               "Replay each engine call as one CUDA graph (TensorRT)");
  app.add_flag("--offload", options.offload,
               "Keep the blocks' weights in host memory, two blocks on the device");
  app.add_flag("--force", options.force,
               "Run a config whose size is 20 times the bundle's own or more");
  app.add_flag("--allow-compile", options.allow_compile,
               "Compile engines that don't fit this machine anew");
  app.add_flag("--check-finite,!--no-check-finite", options.check_finite,
               "Stop at the first step that makes values that are not finite (on by default)");
  app.add_flag("--json", options.json, "Print one JSON object");
  app.add_flag("-q,--quiet", options.quiet, "No progress and no summary");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& fault) {
    // What was parsed before the fault need not hold the flag.
    const bool asks_for_json = std::find(argv, argv + argc, std::string("--json")) != argv + argc;
    if (fault.get_exit_code() == 0 || !asks_for_json) return app.exit(fault) == 0 ? 0 : 2;
    const std::string hint = "see freewheel-run --help";
    print_error("usage", std::string("freewheel-run: ") + fault.what() + "; " + hint,
                "freewheel-run", hint);
    return 2;
  }
  for (std::string* path : {&options.bundle, &options.out, &options.embeddings, &options.negative,
                            &options.latents, &options.condition, &options.lora_folder}) {
    *path = expand_home(*path);
  }
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGPIPE, SIG_IGN);  // an ffmpeg that ends early is a message, not a death
  nlohmann::json report;
  Status status;
  try {
    status = run(options, report);
  } catch (const std::exception& fault) {
    status = Status(Code::kInternal, "freewheel-run", fault.what(), "report this");
  }
  if (status.ok()) {
    if (options.json) {
      print(report);
    } else {
      std::cout << options.out << "\n";
    }
    return 0;
  }
  if (options.json) {
    print_error(freewheel::code_name(status.code()), status.message(), status.where(),
                status.hint());
  } else {
    std::cerr << "error: " << status.message() << "\n";
  }
  return exit_code(status.code());
}

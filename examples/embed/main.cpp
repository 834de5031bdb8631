// SPDX-License-Identifier: Apache-2.0
/// The smallest program around libfreewheel: a sentence to a folder of pictures, at the size, steps
/// and seed that the bundle's default config names.
///   embed BUNDLE "a red circle moving right" FOLDER

#include <cstdio>

#include "freewheel/codec.h"
#include "freewheel/files.h"
#include "freewheel/session.h"

namespace fw = freewheel;

fw::Status make(const char* bundle, const char* sentence, const std::string& folder) {
  auto model = fw::Model::load(bundle);
  if (!model.ok()) return std::move(model).status();
  auto session = fw::Session::create(*model);
  if (!session.ok()) return std::move(session).status();
  fw::Request request;
  request.texts["cond"] = sentence;
  request.cache = "taylorseer";
  request.overrides = {{"interval", std::int64_t{2}}};
  request.decodes = true;
  auto prepared = fw::prepare_run(**model, request);
  if (!prepared.ok()) return std::move(prepared).status();
  fw::Status status = (*session)->run(prepared->run);
  if (!status.ok()) return status;
  auto frames = fw::decode_latents(**model, prepared->run.latents);
  if (!frames.ok()) return std::move(frames).status();
  const fw::Shape size = frames->view().shape;  // 1, frames, height, width, 3
  const auto* pixels = frames->view().as<std::uint8_t>();
  for (std::int64_t i = 0; i < size[1] && status.ok(); ++i) {
    const std::string name = folder + "/" + std::to_string(i) + ".png";
    status = fw::write_png(name, pixels + i * size[2] * size[3] * 3, size[2], size[3]);
  }
  std::printf("%s\n", (*session)->statistics().json().c_str());
  return status;
}

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "embed BUNDLE SENTENCE FOLDER\n"), 2;
  const fw::Status status = make(argv[1], argv[2], argv[3]);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return status.ok() ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
#include "result_file.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <vector>

#include "freewheel/files.h"

namespace {

namespace fs = std::filesystem;
using freewheel::Code;
using freewheel::Result;
using freewheel::Status;
using freewheel::Tensor;
using freewheel::Tensors;

Status write_pictures(const std::string& folder, const Tensor& pixels) {
  std::error_code fault;
  fs::create_directories(folder, fault);
  if (fault) return Status(Code::kOutput, folder, "can't be made: " + fault.message());
  const std::int64_t height = pixels.shape[2], width = pixels.shape[3];
  for (std::int64_t frame = 0; frame < pixels.shape[1]; ++frame) {
    char name[32];
    std::snprintf(name, sizeof name, "/%05lld.png", static_cast<long long>(frame));
    const auto* picture = pixels.as<std::uint8_t>() + frame * height * width * 3;
    Status status = freewheel::write_png(folder + name, picture, height, width);
    if (!status.ok()) return status;
  }
  return {};
}

/// Whether a program of this name would be found.
bool has_ffmpeg() {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "/usr/local/bin:/usr/bin:/bin" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (::access((folder + "/ffmpeg").c_str(), X_OK) == 0) return true;
  }
  return false;
}

/// Writes all bytes to a pipe; false where its reader is gone.
bool write_all(int pipe, const std::uint8_t* bytes, std::size_t count) {
  while (count > 0) {
    const ssize_t written = ::write(pipe, bytes, count);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes += written;
    count -= static_cast<std::size_t>(written);
  }
  return true;
}

/// Has ffmpeg encode frames, which it reads raw from its standard input.
Status write_video(const std::string& place, const Tensor& pixels, int fps) {
  const std::string size = std::to_string(pixels.shape[3]) + "x" + std::to_string(pixels.shape[2]);
  std::vector<std::string> words = {"ffmpeg", "-y",       "-loglevel", "error",
                                    "-f",     "rawvideo", "-pix_fmt",  "rgb24",
                                    "-s",     size,       "-r",        std::to_string(fps),
                                    "-i",     "pipe:0",   "-pix_fmt",  "yuv420p",
                                    "-f",     "mp4",      place};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return Status(Code::kOutput, "ffmpeg", std::strerror(errno));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[0], STDIN_FILENO);
  pid_t child = 0;
  const int fault = ::posix_spawnp(&child, "ffmpeg", &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[0]);
  const bool is_written =
      fault == 0 && write_all(ends[1], pixels.as<std::uint8_t>(), pixels.bytes());
  ::close(ends[1]);
  if (fault != 0) return Status(Code::kOutput, "ffmpeg", std::strerror(fault));
  int ended = 0;
  while (::waitpid(child, &ended, 0) < 0 && errno == EINTR) {
  }
  if (is_written && WIFEXITED(ended) && WEXITSTATUS(ended) == 0) return {};
  return Status(Code::kOutput, "ffmpeg", "can't write the video (its own message stands above)");
}

}  // namespace

std::string expand_home(const std::string& path) {
  const char* home = std::getenv("HOME");
  if (home == nullptr || path.empty() || path[0] != '~') return path;
  return path.size() == 1 || path[1] == '/' ? home + path.substr(1) : path;
}

Result<ResultFile> ResultFile::create(const std::string& given, int fps) {
  const bool has_slash = !given.empty() && given.back() == '/';
  const std::string path = given.substr(0, given.find_last_not_of('/') + 1);
  std::string suffix = fs::path(path).extension().string();
  std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  std::error_code ignored;
  Kind kind = Kind::kFolder;
  if (path.empty()) {
    return Status(Code::kRequest, "--out '" + given + "'", "is no name", "name a file or a folder");
  }
  if (!has_slash && !fs::is_directory(path, ignored)) {
    if (suffix == ".npy") {
      kind = Kind::kNpy;
    } else if (suffix == ".safetensors") {
      kind = Kind::kSafetensors;
    } else if (suffix == ".rgb") {
      kind = Kind::kRgb;
    } else if (suffix == ".mp4") {
      kind = Kind::kVideo;
    } else if (!suffix.empty()) {
      return Status(Code::kRequest, "--out '" + given + "'", "has suffix '" + suffix + "'",
                    "name .mp4 for a video, .npy or .safetensors for latents, .rgb for raw "
                    "frames, or '" +
                        path + "/' for a folder of PNG");
    }
  }
  ResultFile result(path, kind, fps);
  if (Status status = result.check(); !status.ok()) return status;
  return result;
}

Status ResultFile::check() const {
  const std::string where = "--out '" + path_ + "'";
  std::error_code fault;
  const bool is_folder = kind_ == Kind::kFolder;
  if (is_folder && fs::exists(path_, fault)) {
    if (!fs::is_directory(path_, fault)) {
      return Status(Code::kRequest, where, "is a file, not a folder", "name a new folder");
    }
    if (!fs::is_empty(path_, fault)) {
      return Status(Code::kRequest, where, "holds files already", "name a new folder");
    }
  }
  if (kind_ == Kind::kVideo && !has_ffmpeg()) {
    return Status(Code::kRequest, where, "is a video, and no ffmpeg is on the PATH",
                  "install ffmpeg, or name a folder for PNG");
  }
  fs::path above = fs::absolute(path_, fault).parent_path();
  while (!fs::exists(above, fault) && above.has_relative_path()) above = above.parent_path();
  if (!fs::is_directory(above, fault)) {
    return Status(Code::kRequest, where, "'" + above.string() + "' is no folder", "name another");
  }
  if (::access(above.c_str(), W_OK | X_OK) != 0) {
    return Status(Code::kRequest, where, std::string("can't be written: ") + std::strerror(errno),
                  "name another");
  }
  return {};
}

Status ResultFile::check_holds(const std::vector<std::string>& sampled) const {
  if (sampled.size() < 2 || kind_ == Kind::kSafetensors) return {};
  std::string listed;
  for (const std::string& name : sampled) listed += (listed.empty() ? "" : ", ") + name;
  return Status(Code::kRequest, "--out '" + path_ + "'",
                "holds one thing, and the bundle samples " + listed + " at once",
                "name a .safetensors file, which holds all of them");
}

Status ResultFile::write(const Tensors& result) const {
  const fs::path target = path_;
  const fs::path partial = target.parent_path() / ("." + target.filename().string() + "." +
                                                   std::to_string(::getpid()) + ".partial");
  std::error_code fault;
  if (target.has_parent_path()) fs::create_directories(target.parent_path(), fault);
  Status status = write_to(partial.string(), result);
  fault.clear();
  if (status.ok()) fs::rename(partial, target, fault);
  if (status.ok() && !fault) return {};
  const std::string what = status.ok() ? "can't be written: " + fault.message() : status.what();
  fs::remove_all(partial, fault);
  return Status(Code::kOutput, path_, what, "free some space, or name another --out");
}

Status ResultFile::write_to(const std::string& place, const Tensors& results) const {
  const Tensor& result = results.begin()->second;
  switch (kind_) {
    case Kind::kNpy:
      return freewheel::write_npy(place, result);
    case Kind::kSafetensors:
      return freewheel::write_safetensors(place, results);
    case Kind::kRgb:
      return freewheel::write_bytes(place, result.data, result.bytes());
    case Kind::kVideo:
      return write_video(place, result, fps_);
    case Kind::kFolder:
      return write_pictures(place, result);
  }
  return {};
}

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Where a run's result goes: checked before the run, written whole or not at all.

#include <string>
#include <vector>

#include "freewheel/status.h"
#include "freewheel/tensor.h"

/// Replaces a leading "~/" by the user's home folder, as a shell does where it sees one.
std::string expand_home(const std::string& path);

class ResultFile {
 public:
  /// Reads what a name asks for: latents (.npy, .safetensors), raw RGB frames (.rgb), a video that
  /// ffmpeg writes (.mp4), or a new folder of PNG (no suffix, or a slash at the end). Fails where
  /// that can't be written, and where there is no ffmpeg.
  /// @param fps Frames per second of a video.
  static freewheel::Result<ResultFile> create(const std::string& path, int fps);

  bool wants_latents() const noexcept { return kind_ == Kind::kNpy || kind_ == Kind::kSafetensors; }

  /// Refuses a file that holds less than all that a run samples.
  freewheel::Status check_holds(const std::vector<std::string>& sampled) const;

  /// Writes what `wants_latents` says: latents by name, or frames as uint8
  /// [1, frames, height, width, 3].
  freewheel::Status write(const freewheel::Tensors& result) const;

 private:
  enum class Kind { kNpy, kSafetensors, kRgb, kVideo, kFolder };

  ResultFile(std::string path, Kind kind, int fps)
      : path_(std::move(path)), kind_(kind), fps_(fps) {}
  freewheel::Status check() const;
  freewheel::Status write_to(const std::string& place, const freewheel::Tensors& result) const;

  std::string path_;
  Kind kind_;
  int fps_;
};

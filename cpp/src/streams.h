// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Names in a bundle whose model samples several things at once, as a video and its sound. Each of
/// them has a prefix, the first an empty one, and what belongs to it begins so: `latents`,
/// `hidden`, `history`, `residual`, `model_output`, and `audio_latents`, `audio_hidden`, ...

#include <string>

namespace freewheel {

/// What the first of the things that a model samples is called at each place.
inline constexpr char kLatents[] = "latents", kModelOutput[] = "model_output";
inline constexpr char kHidden[] = "hidden", kHistory[] = "history", kResidual[] = "residual";

/// How the outputs of graphs that pass a stream on end.
inline constexpr char kOut[] = "_out";

/// The stream that a graph passes on, or begins, by this output; nothing where it is none.
std::string stream_of(const std::string& output);

/// What belongs to the same thing: `audio_history` beside `audio_hidden`.
/// @param of What `name` would be of the first thing: `hidden`.
/// @param wanted What is looked for, as the first thing's is called: `history`.
std::string beside(const std::string& name, const std::string& of, const std::string& wanted);

/// What a stream's residual or history is called: `text_history` of `text`.
/// @param wanted `residual` or `history`.
std::string kept_name(const std::string& stream, const std::string& wanted);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Named dimensions and the sizes they have: of a request, a tensor, a video.

#include <cstdint>
#include <string>

#include "freewheel/manifest.h"

namespace freewheel {

/// Matches a shape with its declaration; returns the size of each named dimension.
Result<Dims> match_dims(const std::string& name, const Io& io, const Shape& shape);

/// Adds the manifest's derived dimensions to the sizes known.
Result<Dims> derive_dims(const Manifest& manifest, const Dims& sizes);

/// Returns the shape of a declared tensor; fails where a dimension is unknown.
Result<Shape> shape_of(const std::string& name, const Io& io, const Dims& dims);

/// The shape of one video's latents, as the model gives its output.
/// @param frames,height,width Of the video, in frames and pixels.
Result<Shape> latent_shape(const Manifest& manifest, std::int64_t frames, std::int64_t height,
                           std::int64_t width);

/// Times the bundle's own latents from which a run has to be asked for twice.
constexpr std::int64_t kFarBeyond = 20;

/// Sets a run with a carried config that was made for another size beside the bundle's own run.
/// @param config Name of a config; of anything else nothing is said.
/// @param latents Shape of what runs.
/// @param force Lets a run pass that is `kFarBeyond` times the bundle's own or more.
/// @return What to warn of; empty where config and bundle agree.
Result<std::string> check_geometry(const Manifest& manifest, const std::string& config,
                                   const Shape& latents, bool force);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What must hold between the parts of a manifest, once each has been read.

#include "field_reader.h"
#include "freewheel/manifest.h"

namespace freewheel {

/// Checks that names which one part of a manifest uses are there in another; notes every fault.
void check_references(FieldReader& reader, const Manifest& manifest);

}  // namespace freewheel

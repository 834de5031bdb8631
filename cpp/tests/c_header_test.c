/* SPDX-License-Identifier: Apache-2.0 */
#include "freewheel/freewheel.h"

const char* freewheel_header_is_c(void) { return freewheel_status_name(FREEWHEEL_OK); }

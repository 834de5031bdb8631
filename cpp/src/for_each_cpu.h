// SPDX-License-Identifier: Apache-2.0
#pragma once

/// FREEWHEEL_FOR_EACH_CPU before a function: it is compiled for several CPUs, and the loader picks
/// the one with the widest registers that there are. Sanitizers are not up yet when it does.

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FREEWHEEL_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FREEWHEEL_FOR_EACH_CPU
#endif

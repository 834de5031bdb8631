// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Return early on failure: the two macros of this library, for its own sources only.

#define FREEWHEEL_JOIN_(a, b) a##b
#define FREEWHEEL_JOIN(a, b) FREEWHEEL_JOIN_(a, b)

/// Returns from the calling function where `expression` (a Status) is a failure.
#define FREEWHEEL_TRY(expression)                                   \
  do {                                                              \
    if (auto status_ = (expression); !status_.ok()) return status_; \
  } while (false)

/// Declares or assigns `target` from a Result, or returns its failure.
#define FREEWHEEL_ASSIGN(target, expression) \
  FREEWHEEL_ASSIGN_(FREEWHEEL_JOIN(result_, __LINE__), target, expression)
#define FREEWHEEL_ASSIGN_(name, target, expression) \
  auto name = (expression);                         \
  if (!name.ok()) return std::move(name).status();  \
  target = std::move(name).value()

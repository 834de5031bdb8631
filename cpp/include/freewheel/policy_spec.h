// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a policy declares about itself, and the settings it is given. The policy is a graph.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "freewheel/status.h"
#include "freewheel/tensor.h"

namespace freewheel {

/// A parameter's value as configs and requests spell it.
using Value = std::variant<bool, std::int64_t, double, std::string, std::vector<std::int64_t>,
                           std::vector<double>>;

/// Spells a value as messages do: 'text', 0.2, [1, 2].
std::string value_text(const Value& value);

/// Reads a value from JSON text: "0.2", "true", "[1, 2]", "\"newton\""; bare words are strings.
Result<Value> value_from_text(const std::string& text);

/// What a value that may be text spells: text is read by `value_from_text`.
Result<Value> spelled(const Value& value);

/// One small tensor that a policy carries from step to step.
struct StateSpec {
  Shape shape;
  DType dtype = DType::kFloat32;
  double initial = 0.0;
};

/// One runtime input of a policy graph.
struct ParameterSpec {
  Value default_value = 0.0;
  DType dtype = DType::kFloat32;
  Shape shape;
  std::optional<double> minimum, maximum;
  std::vector<std::string> choices;
  bool pad_front = false;
  std::optional<std::string> listed_in;  ///< The policy's parameter that lists what it may be.
  std::string meaning;

  /// Checks a value and turns it into what the graph input holds: one number per element.
  Result<std::vector<double>> numbers(const std::string& name, const Value& value) const;
};

/// How many residuals a policy mixes.
struct HistorySpec {
  std::int64_t maximum = 1;
  std::int64_t depth = 1;
  std::optional<std::string> parameter;
  std::int64_t offset = 0;
};

/// The whole declaration of one policy.
struct PolicySpec {
  std::string name, summary, reference;
  std::vector<std::string> signals;
  bool wants_feature = false;       ///< Of the last computed step.
  bool wants_model_output = false;  ///< The feature is what `finish` gave, not one of `body`.
  bool keeps_previous_signal = false, keeps_previous_feature = false;
  bool keeps_computed_signal = false;  ///< The signal of the last computed step.
  bool keeps_older_signal = false;     ///< The signal of the computed step before that.
  bool keeps_gram = false;             ///< Inner products of the residuals.
  bool is_one_decision = false;        ///< All branches follow the one that runs a step first.
  HistorySpec history;
  /// The parameters that say how many first and last blocks run at every step, where the signal is
  /// what the first ones add; without one that is 1, and 0.
  std::optional<std::string> first_blocks, last_blocks;
  std::map<std::string, StateSpec> state;
  std::map<std::string, ParameterSpec> parameters;
  std::optional<std::string> distance;

  /// Fills defaults in and checks every parameter: name → numbers of the graph input.
  Result<std::map<std::string, std::vector<double>>> resolve(
      const std::map<std::string, Value>& given) const;
};

/// Limits that hold for every policy.
struct Guard {
  /// Those that the manifest writes, such as `first_exact`: inputs `guard.<name>` of the policy's
  /// graph. One that is not there is 0.
  std::map<std::string, std::int64_t> limits;
  std::vector<std::int64_t> exact_steps;  ///< Always computed.

  friend bool operator==(const Guard& a, const Guard& b) {
    return a.limits == b.limits && a.exact_steps == b.exact_steps;
  }
};

/// PSNR against the uncached run that runs keep, by computed steps.
struct Promise {
  double coverage = 0.0;     ///< Share of runs that keep it.
  std::int64_t runs = 0;     ///< That it was measured on.
  std::vector<double> psnr;  ///< dB, one for each of the parameter `budgets`.

  friend bool operator==(const Promise& a, const Promise& b) {
    return a.coverage == b.coverage && a.runs == b.runs && a.psnr == b.psnr;
  }
};

/// A policy with its signal, parameters and guard: what one run is told to do.
struct CacheSetting {
  std::string policy = "off";
  std::optional<std::string> signal;
  std::map<std::string, Value> parameters;
  Guard guard;
  /// Branch → overrides of `parameters` in that branch alone.
  std::map<std::string, std::map<std::string, Value>> branches;
  /// Seconds that the denoise loop may take, for a policy that chooses its computed steps by them.
  std::optional<double> deadline;
  /// Least PSNR in dB against the uncached run, which chooses the computed steps likewise.
  std::optional<double> min_psnr;
  std::optional<Promise> promise;  ///< What numbers of computed steps keep, if it was measured.

  /// The setting of one branch: its overrides are among the parameters.
  CacheSetting for_branch(const std::string& name) const;

  friend bool operator==(const CacheSetting& a, const CacheSetting& b) {
    return a.policy == b.policy && a.signal == b.signal && a.parameters == b.parameters &&
           a.guard == b.guard && a.branches == b.branches && a.deadline == b.deadline &&
           a.min_psnr == b.min_psnr && a.promise == b.promise;
  }
};

/// Replacements in a setting: one of `override_names`, and its value; text may spell a number or a
/// list, as `value_from_text` reads it.
using Overrides = std::vector<std::pair<std::string, Value>>;

/// What an override may name: the policy's parameters, the guard's limits, `exact_steps`, `signal`,
/// `deadline` (seconds, as a number or "20s"), `min_psnr` (dB).
std::vector<std::string> override_names(const PolicySpec& spec, const Guard& guard);

/// Replaces one of `override_names`, in every branch. The value is checked by its declaration.
/// @param spec Of the setting's policy.
/// @param also_known Names that stand beside overrides where this one was read, for the hint.
Status apply_override(const std::string& key, const Value& value, const PolicySpec& spec,
                      CacheSetting& setting, const std::vector<std::string>& also_known = {});

/// Says which names are known and which one `name` most resembles, for a message's hint.
std::string nearest(const std::string& name, std::vector<std::string> known);

}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "cpu_precision.h"

#include <gtest/gtest.h>

#include <tuple>

namespace freewheel {
namespace {

using Capabilities = std::vector<std::string>;

TEST(CpuPrecisionTest, EachKindOfCpuComputesInWhatItHas) {
  // The same rows as test_each_kind_of_cpu_computes_in_what_it_has of tests/engines.
  const Capabilities plain = {"FP32", "INT8"}, bfloat16 = {"BF16", "FP32"},
                     both = {"BF16", "FP16", "FP32"};
  const std::tuple<Capabilities, std::string, std::string> rows[] = {
      {plain, "float32", "float32"},      {plain, "bfloat16", "float32"},
      {plain, "float16", "float32"},      {bfloat16, "float32", "float32"},
      {bfloat16, "bfloat16", "bfloat16"}, {bfloat16, "float16", "float32"},
      {both, "bfloat16", "bfloat16"},     {both, "float16", "float16"},
  };
  for (const auto& [capabilities, precision, expected] : rows) {
    EXPECT_EQ(computed_in(precision, capabilities), expected);
  }
}

}  // namespace
}  // namespace freewheel

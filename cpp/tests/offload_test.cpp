// SPDX-License-Identifier: Apache-2.0
#include "offload.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

namespace freewheel {
namespace {

class NoCall final : public BoundCall {
 public:
  Status run() noexcept override { return {}; }
};

/// Notes the addresses that it is bound to.
class Watching final : public Engine {
 public:
  explicit Watching(EngineRecord record) : Engine("watching", std::move(record)) {}
  std::vector<std::uintptr_t> addresses;

 protected:
  Result<std::unique_ptr<BoundCall>> bind_checked(const Tensors& bindings) override {
    for (const auto& [name, tensor] : bindings) {
      addresses.push_back(reinterpret_cast<std::uintptr_t>(tensor.data));
    }
    return std::unique_ptr<BoundCall>(std::make_unique<NoCall>());
  }
};

TEST(OffloadedWeights, LieWhereEnginesTakeAnAddress) {
  EngineRecord record;
  record.inputs = {{"a", Io{DType::kFloat32, {std::int64_t{3}}}},
                   {"b", Io{DType::kFloat32, {std::int64_t{5}}}},
                   {"c", Io{DType::kFloat32, {std::int64_t{64}}}}};
  Watching engine(record);
  std::vector<float> values(64);
  OffloadedWeights weights(
      host_memory(),
      [&](const std::string& name) -> Result<Tensor> {
        const std::int64_t size = name == "0.a" ? 3 : name == "0.b" ? 5 : 64;
        return Tensor{values.data(), DType::kFloat32, Shape{size}};
      },
      [](const std::string&) { return false; }, nullptr);
  auto bound =
      weights.bind(engine, {}, {{"a", "{block}.a"}, {"b", "{block}.b"}, {"c", "{block}.c"}},
                   {{"a", "0.a"}, {"b", "0.b"}, {"c", "0.c"}}, 0);
  ASSERT_TRUE(bound.ok()) << bound.status().message();
  ASSERT_EQ(engine.addresses.size(), 3u);
  EXPECT_EQ(engine.addresses[1] - engine.addresses[0], 256u);
  EXPECT_EQ(engine.addresses[2] - engine.addresses[1], 256u);
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
/// The step loop allocates nothing: operator new is counted between two progress events.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tiny_bundle.h"

namespace {

std::atomic<long> allocations{0};

}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace freewheel {
namespace {

TEST(StepLoop, AllocatesNothingAfterItsFirstStep) {
  testing::TemporaryFolder folder;
  (void)testing::write_tiny_bundle(folder);
  auto model = testing::load_tiny(folder, std::make_shared<testing::Calls>());
  ASSERT_TRUE(model.ok());
  auto session = Session::create(*model);
  ASSERT_TRUE(session.ok());
  for (const char* policy : {"off", "interval", "motion", "signal", "probe", "follow"}) {
    testing::TinyRun run;
    run.request.cache.policy = policy;
    long before = -1, after = -1;
    int computed = 0, reused = 0;
    run.request.on_branch_step = [&](const BranchEvent& event) {
      if (event.step_index == 0) before = allocations.load();
      after = allocations.load();
      ++(event.computed ? computed : reused);
    };
    ASSERT_TRUE((*session)->run(run.request).ok());
    EXPECT_EQ(after - before, 0) << policy << ": " << computed << " computed, " << reused
                                 << " reused";
  }
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/status.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

TEST(Status, MessageHasThreeParts) {
  const Status status(Code::kBundle, "file 'a'", "is missing", "build it again");
  EXPECT_EQ(status.message(), "file 'a': is missing; build it again");
  EXPECT_STREQ(code_name(status.code()), "bundle");
  EXPECT_EQ(Status(Code::kFailed, "a", "b").message(), "a: b");
}

TEST(Status, CopiesOwnTheirText) {
  Status copy;
  EXPECT_TRUE(copy.ok());
  EXPECT_EQ(copy.message(), "ok");
  {
    const Status status(Code::kRequest, "x", "y", "z");
    copy = status;
  }
  EXPECT_EQ(copy.message(), "x: y; z");
  const Status moved = std::move(copy);
  EXPECT_EQ(moved.code(), Code::kRequest);
}

TEST(Result, HoldsAValueOrAStatus) {
  const Result<int> value(3);
  ASSERT_TRUE(value.ok());
  EXPECT_EQ(*value, 3);
  const Result<int> fault(Status(Code::kFailed, "a", "b"));
  ASSERT_FALSE(fault.ok());
  EXPECT_EQ(fault.status().where(), "a");
}

}  // namespace
}  // namespace freewheel

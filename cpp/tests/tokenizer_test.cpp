// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.h"

#include <gtest/gtest.h>

namespace freewheel {
namespace {

TEST(Tokenizer, WellFormedUtf8IsTold) {
  for (const char* text : {"", "a red circle", "caf\u00e9", "\u4e00", "\U0001f433", "\U0010ffff"}) {
    EXPECT_TRUE(is_utf8(text)) << text;
  }
  // A lone byte, a cut character, overlong forms, a surrogate, one beyond Unicode, a stray tail.
  for (const char* text : {"\xff", "a\xe4\xb8", "\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80",
                           "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80", "\xc3("}) {
    EXPECT_FALSE(is_utf8(text)) << text;
  }
}

TEST(Tokenizer, AFileThatIsNoGraphIsNamed) {
  const auto loaded = load_tokenizer("/nowhere/model.xml");
  ASSERT_FALSE(loaded.ok());
  EXPECT_EQ(loaded.status().code(), Code::kBackend);
  EXPECT_EQ(loaded.status().where(), "tokenizer");
}

}  // namespace
}  // namespace freewheel

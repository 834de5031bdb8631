// SPDX-License-Identifier: Apache-2.0
// Replays what fuzzing found worth keeping: no reader crashes, and every refusal says what to do.
#include <gtest/gtest.h>

#include <filesystem>

#include "freewheel/files.h"
#include "fuzz/readers.h"

namespace freewheel {
namespace {

TEST(Corpus, EveryReaderTakesWhatFuzzingFound) {
  for (const fuzz::Row& row : fuzz::kReaders) {
    const std::filesystem::path folder = std::filesystem::path(FREEWHEEL_CORPUS) / row.name;
    std::size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      const auto file = MappedFile::open(entry.path().string());
      ASSERT_TRUE(file.ok()) << file.status().message();
      row.reader(file->data(), file->size());
      ++count;
    }
    EXPECT_GE(count, 5u) << folder;
  }
}

}  // namespace
}  // namespace freewheel

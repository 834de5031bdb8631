// SPDX-License-Identifier: Apache-2.0
#include "freewheel/files.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "tiny_bundle.h"

namespace freewheel {
namespace {

std::string with_header(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string text(reinterpret_cast<const char*>(&length), sizeof length);
  return text + header + data;
}

class FilesTest : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path() + "/" + name; }
  std::string safetensors_fault(const std::string& content) const {
    folder_.write("a.safetensors", content);
    const auto file = SafetensorsFile::open(path("a.safetensors"));
    return file.ok() ? "ok" : file.status().message();
  }
  testing::TemporaryFolder folder_;
};

TEST_F(FilesTest, SafetensorsRoundTrip) {
  std::vector<float> values = {1, 2, 3, 4, 5, 6};
  std::vector<std::int64_t> ids = {7};
  ASSERT_TRUE(write_safetensors(path("b.safetensors"),
                                {{"x", {values.data(), DType::kFloat32, Shape{2, 3}}},
                                 {"ids", {ids.data(), DType::kInt64, Shape{1}}}})
                  .ok());
  const auto file = SafetensorsFile::open(path("b.safetensors"));
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->tensors.at("x").shape, (Shape{2, 3}));
  EXPECT_EQ(std::memcmp(file->tensors.at("x").data, values.data(), 24), 0);
  EXPECT_EQ(*file->tensors.at("ids").as<std::int64_t>(), 7);
}

TEST_F(FilesTest, HostileSafetensorsAreRefused) {
  const std::string data(8, '\0');
  const auto entry = [](const std::string& shape, const std::string& offsets) {
    return "{\"x\": {\"dtype\": \"F32\", \"shape\": " + shape + ", \"data_offsets\": " + offsets +
           "}}";
  };
  EXPECT_EQ(safetensors_fault(with_header(entry("[2]", "[0, 8]"), data)), "ok");
  EXPECT_NE(safetensors_fault(""), "ok");
  EXPECT_NE(safetensors_fault(std::string(8, '\xff')), "ok");
  EXPECT_NE(safetensors_fault(with_header("{", data)), "ok");
  EXPECT_NE(safetensors_fault(with_header("[]", data)), "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[3]", "[0, 8]"), data)), "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[2]", "[0, 16]"), data)), "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[2]", "[8, 0]"), data)), "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[2]", "[-8, 0]"), data)), "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[-2]", "[0, 8]"), data)), "ok");
  EXPECT_NE(safetensors_fault(
                with_header(entry("[4611686018427387904, 4611686018427387904]", "[0, 8]"), data)),
            "ok");
  EXPECT_NE(safetensors_fault(with_header(entry("[2]", "[0, 8]"), data + "x")), "ok");
  EXPECT_NE(safetensors_fault(with_header("{\"x\": {\"dtype\": \"Q4\", \"shape\": [2], "
                                          "\"data_offsets\": [0, 8]}}",
                                          data)),
            "ok");
  EXPECT_NE(safetensors_fault(with_header("{\"x\": 3}", data)), "ok");
}

TEST_F(FilesTest, NpyRoundTrip) {
  std::vector<float> values(24, 0.5f);
  ASSERT_TRUE(write_npy(path("x.npy"), {values.data(), DType::kFloat32, Shape{2, 3, 4}}).ok());
  const auto read = read_npy(path("x.npy"));
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->view().shape, (Shape{2, 3, 4}));
  EXPECT_EQ(read->view().as<float>()[23], 0.5f);
  std::uint16_t bits = 0;
  EXPECT_EQ(write_npy(path("y.npy"), {&bits, DType::kBfloat16, Shape{1}}).code(), Code::kOutput);
}

TEST_F(FilesTest, HostileNpyIsRefused) {
  for (const std::string& text :
       {std::string("x"), std::string("\x93NUMPY\x01\x00\xff\xff", 10) + "{}",
        std::string("\x93NUMPY\x01\x00\x3c\x00", 10) +
            "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, )}",
        std::string("\x93NUMPY\x01\x00\x3a\x00", 10) +
            "{'descr': '|O', 'fortran_order': False, 'shape': (1, ), }  "}) {
    folder_.write("bad.npy", text);
    EXPECT_EQ(read_npy(path("bad.npy")).status().code(), Code::kRequest);
  }
}

TEST_F(FilesTest, PngHasItsSignatureAndSize) {
  const std::vector<std::uint8_t> pixels(4 * 5 * 3, 200);
  ASSERT_TRUE(write_png(path("x.png"), pixels.data(), 4, 5).ok());
  const auto text = read_text(path("x.png"), 1 << 20, Code::kFailed);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(text->substr(1, 3), "PNG");
  EXPECT_EQ((*text)[19], 5);
  EXPECT_EQ((*text)[23], 4);
}

TEST_F(FilesTest, WritingWhereNothingCanBeWrittenFails) {
  const Status status = write_bytes(path("no/such/folder"), "x", 1);
  EXPECT_EQ(status.code(), Code::kOutput);
  EXPECT_FALSE(status.hint().empty());
}

TEST_F(FilesTest, FoldersAndMissingFilesAreNoFiles) {
  EXPECT_FALSE(MappedFile::open(folder_.path()).ok());
  EXPECT_FALSE(MappedFile::open(path("missing")).ok());
  folder_.write("empty", "");
  EXPECT_EQ(MappedFile::open(path("empty"))->size(), 0u);
}

}  // namespace
}  // namespace freewheel

// SPDX-License-Identifier: Apache-2.0
#include "freewheel/lora.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "freewheel/session.h"
#include "tiny_bundle.h"

namespace freewheel {
namespace {

using nlohmann::json;
using testing::TinyRun;

/// Shape and numbers, float32 in files.
struct Numbers {
  Shape shape;
  std::vector<float> values;
};
using Named = std::map<std::string, Numbers>;

const std::string kDigest(64, 'a');

/// The bytes of a safetensors file.
std::string safetensors(const Named& tensors, const json& metadata, const char* dtype = "F32") {
  json header = {{"__metadata__", metadata}};
  std::string data;
  for (const auto& [name, numbers] : tensors) {
    const std::size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(numbers.values.data()), numbers.values.size() * 4);
    json sizes = json::array();
    for (const std::int64_t size : numbers.shape) sizes.push_back(size);
    header[name] = {{"dtype", dtype}, {"shape", sizes}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  const std::uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text + data;
}

json written_for(const std::string& checkpoint) {
  return {{"freewheel_lora", "1"}, {"checkpoint_sha256", checkpoint}};
}

/// A pair that adds up · down to one block's only number.
Named on_block(int block, float up, float down) {
  const std::string module = "transformer.blocks." + std::to_string(block);
  return {{module + ".lora_A.weight", {Shape{1, 1}, {down}}},
          {module + ".lora_B.weight", {Shape{1, 1}, {up}}}};
}

void expect_says(const Status& status, const std::string& part) {
  EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  EXPECT_FALSE(status.where().empty() || status.hint().empty()) << status.message();
  EXPECT_EQ(status.code(), Code::kRequest) << status.message();
}

class LoraTest : public ::testing::Test {
 protected:
  void SetUp() override {
    manifest_ = testing::write_tiny_bundle(folder_);
    load();
  }

  void load(bool offload = false) {
    testing::write_manifest(folder_, manifest_);
    ModelOptions options;
    options.custom_backend = testing::plain_backend(calls_);
    options.lora_folder = loras_.path();
    options.offload = offload;
    auto model = Model::load(folder_.path(), options);
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = *model;
    auto session = Session::create(model_);
    ASSERT_TRUE(session.ok()) << session.status().message();
    session_ = std::move(session).value();
  }

  void write(const std::string& name, const Named& tensors) const {
    loras_.write(name + ".safetensors", safetensors(tensors, written_for(kDigest)));
  }

  /// Adds a weight that the head reads, of numbers in one of the dtypes that weights have.
  void add_weight(const std::string& name, DType dtype, const Numbers& numbers) {
    auto stored = Buffer::create(host_memory(), dtype, numbers.shape);
    ASSERT_TRUE(stored.ok());
    std::vector<float> values = numbers.values;
    ASSERT_TRUE(convert({values.data(), DType::kFloat32, numbers.shape}, stored->view()).ok());
    const std::string file = "weights/" + name + ".safetensors";
    ASSERT_TRUE(write_safetensors(folder_.path() + "/" + file, {{name, stored->view()}}).ok());
    const auto written = SafetensorsFile::open(folder_.path() + "/" + file);
    ASSERT_TRUE(written.ok());
    json sizes = json::array();
    for (const std::int64_t size : numbers.shape) sizes.push_back(size);
    const auto offset = written->tensors.at(name).as<std::uint8_t>() - written->file.data();
    manifest_["tensors"][name] = {{"file", file},
                                  {"dtype", dtype_name(dtype)},
                                  {"shape", sizes},
                                  {"offset", offset},
                                  {"bytes", stored->view().bytes()}};
    manifest_["files"][file] = {{"bytes", std::filesystem::file_size(folder_.path() + "/" + file)},
                                {"sha256", std::string(64, '0')}};
    manifest_["graphs"]["head"]["weights"][name] = name;
    testing::write_manifest(folder_, manifest_);
  }

  /// What the LoRAs of a request make of the bundle's weights, as float32.
  std::map<std::string, std::vector<float>> merged(const std::string& text, int threads = 1) const {
    std::map<std::string, std::vector<float>> found;
    const auto bundle = Bundle::open(folder_.path());
    EXPECT_TRUE(bundle.ok()) << bundle.status().message();
    const auto uses = find_loras(loras_.path(), text);
    EXPECT_TRUE(uses.ok()) << uses.status().message();
    const auto loras = open_loras(**bundle, *uses);
    EXPECT_TRUE(loras.ok()) << loras.status().message();
    const auto weights = merge_loras(**bundle, *loras, threads);
    EXPECT_TRUE(weights.ok()) << weights.status().message();
    for (const auto& [name, buffer] : *weights) {
      std::vector<float>& values = found[name];
      values.resize(static_cast<std::size_t>(buffer.view().shape.elements()));
      EXPECT_TRUE(
          convert(buffer.view(), {values.data(), DType::kFloat32, buffer.view().shape}).ok());
    }
    return found;
  }

  std::vector<float> run(Session& session, const std::string& lora,
                         const std::string& policy = "off") const {
    TinyRun run;
    run.request.cache.policy = policy;
    auto loras = find_loras(loras_.path(), lora);
    EXPECT_TRUE(loras.ok()) << loras.status().message();
    run.request.loras = std::move(loras).value();
    const Status status = session.run(run.request);
    EXPECT_TRUE(status.ok()) << status.message();
    return run.latents;
  }

  /// What the same run gives where the bundle itself holds another number in a block.
  std::vector<float> run_with_weight(int block, float value) const {
    const testing::TemporaryFolder folder;
    const json manifest = testing::write_tiny_bundle(folder);
    const json& entry = manifest["tensors"]["blocks." + std::to_string(block) + ".weight"];
    std::fstream file(folder.path() + "/" + entry["file"].get<std::string>(),
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(entry["offset"].get<std::int64_t>());
    file.write(reinterpret_cast<const char*>(&value), sizeof value);
    file.close();
    const auto model = testing::load_tiny(folder, calls_);
    EXPECT_TRUE(model.ok()) << model.status().message();
    const auto session = Session::create(*model);
    EXPECT_TRUE(session.ok());
    return run(**session, "");
  }

  /// Why a run with this LoRA is refused, before anything is computed.
  Status fault(const std::string& lora) const {
    TinyRun run;
    auto loras = find_loras(loras_.path(), lora);
    EXPECT_TRUE(loras.ok()) << loras.status().message();
    run.request.loras = std::move(loras).value();
    const int before = calls_->prompt + calls_->head;
    Status status = session_->run(run.request);
    EXPECT_EQ(calls_->prompt + calls_->head, before);
    EXPECT_FALSE(status.ok());
    return status;
  }

  testing::TemporaryFolder folder_, loras_;
  json manifest_;
  std::shared_ptr<testing::Calls> calls_ = std::make_shared<testing::Calls>();
  std::shared_ptr<Model> model_;
  std::unique_ptr<Session> session_;
};

TEST_F(LoraTest, NamesAndScalesAreRead) {
  write("style", on_block(0, 1.0f, 1.0f));
  write("Other_2.b", on_block(0, 1.0f, 1.0f));
  const auto uses = find_loras(loras_.path(), "style,Other_2.b:-0.25");
  ASSERT_TRUE(uses.ok()) << uses.status().message();
  ASSERT_EQ(uses->size(), 2u);
  EXPECT_EQ((*uses)[0].path, loras_.path() + "/style.safetensors");
  EXPECT_EQ((*uses)[0].scale, 1.0);
  EXPECT_EQ((*uses)[1].path, loras_.path() + "/Other_2.b.safetensors");
  EXPECT_EQ((*uses)[1].scale, -0.25);
  EXPECT_TRUE(find_loras("", "")->empty());
}

TEST_F(LoraTest, NamesThatCanNotBeReadAreRefused) {
  write("style", on_block(0, 1.0f, 1.0f));
  std::filesystem::create_directory(loras_.path() + "/folder.safetensors");
  const std::map<std::string, std::string> faults = {
      {"stile", "did you mean 'style'"},
      {"../style", "is no plain name"},
      {"/etc/passwd", "is no plain name"},
      {".hidden", "is no plain name"},
      {"style,", "is no plain name"},
      {std::string("style\0x", 7), "is no plain name"},
      {"folder", "is not in the folder of LoRAs"},
      {"style:", "has scale ''; write name:0.8"},
      {"style:much", "has scale 'much'; write name:0.8"},
      {"style:true", "has scale 'true'"},
      {"style:{}", "has scale '{}'"},
      {"style:1e99", "has scale '1e99'"},
      {"style:1:2", "has scale '1:2'"},
      {"style,style:0.5", "is named twice"},
  };
  for (const auto& [text, said] : faults) {
    const auto uses = find_loras(loras_.path(), text);
    ASSERT_FALSE(uses.ok()) << text;
    expect_says(uses.status(), said);
  }
  expect_says(find_loras("", "style").status(), "no folder of LoRAs is open here");
}

TEST_F(LoraTest, ARequestNamesThem) {
  write("style", on_block(0, 1.0f, 1.0f));
  Request request;
  ASSERT_TRUE(request.set("lora", std::string("style:0.5")).ok());
  const std::vector<float> states(6, 0.5f);
  for (const char* side : kSides) {
    request.prompts[side]["text_states"] = {const_cast<float*>(states.data()), DType::kFloat32,
                                            Shape{1, 2, 3}};
  }
  const auto prepared = prepare_run(*model_, request);
  ASSERT_TRUE(prepared.ok()) << prepared.status().message();
  ASSERT_EQ(prepared->run.loras.size(), 1u);
  EXPECT_EQ(prepared->run.loras[0].scale, 0.5);
  ASSERT_TRUE(request.set("lora", std::string("none")).ok());
  expect_says(prepare_run(*model_, request).status(), "is not in the folder of LoRAs");
  loras_.write("style.safetensors", "cut short");
  ASSERT_TRUE(request.set("lora", std::string("style")).ok());
  EXPECT_FALSE(prepare_run(*model_, request).ok()) << "files are read before the run begins";
}

TEST_F(LoraTest, FilesThatDoNotFitAreRefusedBeforeAnythingIsComputed) {
  const auto with = [](Named tensors, const std::string& name, const Numbers& numbers) {
    tensors[name] = numbers;
    return tensors;
  };
  const Named fine = on_block(0, 1.0f, 1.0f);
  loras_.write("short.safetensors", "cut short");
  loras_.write("plain.safetensors", safetensors(fine, json::object()));
  loras_.write("later.safetensors", safetensors(fine, {{"freewheel_lora", "2"}}));
  loras_.write("other.safetensors", safetensors(fine, written_for(std::string(64, 'b'))));
  Named short_numbers = fine;
  for (auto& [name, numbers] : short_numbers) numbers.shape = Shape{1, 2};
  loras_.write("half.safetensors", safetensors(short_numbers, written_for(kDigest), "BF16"));
  write("unknown", on_block(7, 1.0f, 1.0f));
  write("part", {{"vae.blocks.0.lora_A.weight", {Shape{1, 1}, {1.0f}}}});
  write("suffix", {{"transformer.blocks.0.alpha", {Shape{1}, {1.0f}}}});
  write("nothing", {{".lora_A.weight", {Shape{1}, {1.0f}}}});
  write("pair", {{"transformer.blocks.0.lora_A.weight", {Shape{1, 1}, {1.0f}}}});
  write("rows", with(fine, "transformer.blocks.0.lora_B.weight", {Shape{2, 1}, {1.0f, 1.0f}}));
  write("rank", with(fine, "transformer.blocks.0.lora_B.weight", {Shape{1, 2}, {1.0f, 1.0f}}));
  write("columns", with(fine, "transformer.blocks.0.lora_A.weight", {Shape{1, 2}, {1.0f, 1.0f}}));
  write("magnitude",
        with(fine, "transformer.blocks.0.lora_magnitude_vector.weight", {Shape{2}, {1.0f, 1.0f}}));
  write("bias", {{"transformer.blocks.0.lora_B.bias", {Shape{1}, {1.0f}}}});
  write("shape", {{"transformer.blocks.0.weight.difference", {Shape{2}, {1.0f, 1.0f}}}});
  write("both", with(fine, "transformer.blocks.0.weight.difference", {Shape{1}, {1.0f}}));
  const std::map<std::string, std::string> faults = {
      {"short", "short.safetensors"},
      {"plain", "is no LoRA that 'freewheel lora' wrote"},
      {"later", "is no LoRA that 'freewheel lora' wrote"},
      {"other", "was written for the checkpoint bbbbbbbbbbbb, the bundle is of aaaaaaaaaaaa"},
      {"half", "is bfloat16, expected float32"},
      {"unknown", "weight 'blocks.7.weight': is none of this model's"},
      {"part", "changes no weight of this model"},
      {"suffix", "'transformer.blocks.0.alpha': changes no weight of this model"},
      {"nothing", "changes no weight of this model"},
      {"pair", "has one half of a pair"},
      {"rows", "its change [2, 1] times [1, 1]"},
      {"rank", "its change [1, 2] times [1, 1]"},
      {"columns", "its change [1, 1] times [1, 2]"},
      {"magnitude", "blocks.0.weight"},
      {"bias", "weight 'blocks.0.bias': is none of this model's"},
      {"shape", "weight 'blocks.0.weight': is [1], its change [2]"},
      {"both", "weight 'blocks.0.weight': has a pair beside its difference"},
  };
  for (const auto& [name, said] : faults) expect_says(fault(name), said);
  const std::vector<float> plain = run(*session_, "");
  EXPECT_EQ(run(*session_, ""), plain);
}

TEST_F(LoraTest, WeightsInsideEnginesAndOfOtherDtypesAreLeftAlone) {
  write("style", on_block(0, 1.0f, 1.0f));
  const auto opened = [&]() -> Status {
    testing::write_manifest(folder_, manifest_);
    auto bundle = Bundle::open(folder_.path());
    if (!bundle.ok()) return std::move(bundle).status();
    auto loras = open_loras(**bundle, *find_loras(loras_.path(), "style"));
    return loras.ok() ? Status() : std::move(loras).status();
  };
  EXPECT_TRUE(opened().ok()) << opened().message();
  manifest_["tensors"]["blocks.0.weight"]["dtype"] = "int32";
  expect_says(opened(), "is int32 [1], which no LoRA changes");
  manifest_["tensors"]["blocks.0.weight"]["dtype"] = "float32";
  manifest_["weights"] = "baked";
  expect_says(opened(), "weights are inside its engines");
}

/// The numbers 0.01, -0.02, 0.03, ….
std::vector<float> numbers(std::int64_t count, float step) {
  std::vector<float> found;
  for (std::int64_t i = 1; i <= count; ++i) {
    found.push_back((i % 2 == 0 ? -step : step) * static_cast<float>(i % 17));
  }
  return found;
}

TEST_F(LoraTest, AMergeIsTheSumInFloat32RoundedToTheWeightsDtype) {
  constexpr std::int64_t kRows = 6, kColumns = 10, kRanks[] = {7, 4};
  constexpr double kScales[] = {0.5, -2.0};
  const std::vector<float> base = numbers(kRows * kColumns, 0.125f);  // exact in every dtype
  Named files[2];
  std::map<std::string, std::vector<float>> expected;
  const std::map<std::string, DType> kinds = {
      {"single", DType::kFloat32}, {"brain", DType::kBfloat16}, {"half", DType::kFloat16}};
  for (const auto& [name, dtype] : kinds) {
    add_weight(name + ".weight", dtype, {Shape{kRows, 5, 2}, base});
    add_weight(name + ".bias", dtype, {Shape{kRows}, numbers(kRows, 0.25f)});
    std::vector<float> weight = base, bias = numbers(kRows, 0.25f);
    for (int file = 0; file < 2; ++file) {
      const std::int64_t rank = kRanks[file];
      const auto down = numbers(rank * kColumns, 0.011f), up = numbers(kRows * rank, 0.007f);
      const auto difference = numbers(kRows, 0.3f);
      const std::string module = "transformer." + name;
      files[file][module + ".lora_A.weight"] = {Shape{rank, 5, 2}, down};
      files[file][module + ".lora_B.weight"] = {Shape{kRows, rank, 1}, up};
      files[file][module + ".lora_B.bias"] = {Shape{kRows}, difference};
      const auto scale = static_cast<float>(kScales[file]);
      for (std::int64_t row = 0; row < kRows; ++row) {
        bias[static_cast<std::size_t>(row)] += scale * difference[static_cast<std::size_t>(row)];
        for (std::int64_t column = 0; column < kColumns; ++column) {
          float sum = 0.0f;
          for (std::int64_t k = 0; k < rank; ++k) {
            const volatile float product = up[static_cast<std::size_t>(row * rank + k)] *
                                           down[static_cast<std::size_t>(k * kColumns + column)];
            sum += product;
          }
          const volatile float change = scale * sum;
          weight[static_cast<std::size_t>(row * kColumns + column)] += change;
        }
      }
    }
    for (auto& [part, values] : {std::pair{".weight", &weight}, std::pair{".bias", &bias}}) {
      const Shape shape{static_cast<std::int64_t>(values->size())};
      auto rounded = Buffer::create(host_memory(), dtype, shape);
      ASSERT_TRUE(rounded.ok());
      ASSERT_TRUE(convert({values->data(), DType::kFloat32, shape}, rounded->view()).ok());
      ASSERT_TRUE(convert(rounded->view(), {values->data(), DType::kFloat32, shape}).ok());
      expected[name + part] = *values;
    }
  }
  write("first", files[0]);
  write("second", files[1]);
  const auto found = merged("first:0.5,second:-2");
  EXPECT_EQ(found, expected) << "every number, and no weight but those that change";
}

TEST_F(LoraTest, ThreadsDivideRowsAndChangeNothing) {
  constexpr std::int64_t kRows = 301, kColumns = 512, kRank = 32;
  add_weight("wide.weight", DType::kBfloat16,
             {Shape{kRows, kColumns}, numbers(kRows * kColumns, 0.125f)});
  write("wide", {{"transformer.wide.lora_A.weight",
                  {Shape{kRank, kColumns}, numbers(kRank * kColumns, 0.011f)}},
                 {"transformer.wide.lora_B.weight",
                  {Shape{kRows, kRank}, numbers(kRows * kRank, 0.007f)}}});
  const auto alone = merged("wide", 1);
  ASSERT_EQ(alone.size(), 1u);
  EXPECT_EQ(merged("wide", 3), alone);
  EXPECT_EQ(merged("wide", 0), alone);
}

TEST_F(LoraTest, AMagnitudeIsTheLengthOfEachRow) {
  add_weight("turned.weight", DType::kFloat32, {Shape{2, 2}, {1.0f, 0.0f, 0.0f, 2.0f}});
  write("turn", {{"transformer.turned.lora_A.weight", {Shape{1, 2}, {3.0f, 4.0f}}},
                 {"transformer.turned.lora_B.weight", {Shape{2, 1}, {1.0f, 0.0f}}},
                 {"transformer.turned.lora_magnitude_vector.weight", {Shape{2}, {10.0f, 1.0f}}}});
  const auto found = merged("turn").at("turned.weight");
  const float length = std::sqrt(4.0f * 4.0f + 4.0f * 4.0f);
  const std::vector<float> expected = {4.0f * 10.0f / length, 4.0f * 10.0f / length, 0.0f, 1.0f};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(found[i], expected[i]);
  write("push",
        {{"transformer.turned.weight.difference", {Shape{2, 2}, {8.0f, 0.0f, 0.0f, 2.0f}}}});
  const auto pushed = merged("push:0.5,turn").at("turned.weight");
  const std::vector<float> both = {8.0f * 10.0f / length, 4.0f * 10.0f / length, 0.0f, 1.5f};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_FLOAT_EQ(pushed[i], both[i]) << "the length is that of the weight without the other";
  }
}

TEST_F(LoraTest, ADifferenceIsAddedToAParameterOfAnyShape) {
  add_weight("table", DType::kBfloat16, {Shape{1, 2, 3}, {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f}});
  add_weight("norm.weight", DType::kFloat32, {Shape{2}, {1.0f, 2.0f}});
  write("whole",
        {{"transformer.table.difference", {Shape{1, 2, 3}, {2.0f, 0.0f, -2.0f, 4.0f, 0.0f, 1.0f}}},
         {"transformer.norm.weight.difference", {Shape{2}, {4.0f, -4.0f}}}});
  const std::map<std::string, std::vector<float>> expected = {
      {"table", {2.0f, 2.0f, 2.0f, 6.0f, 5.0f, 6.5f}}, {"norm.weight", {3.0f, 0.0f}}};
  EXPECT_EQ(merged("whole:0.5"), expected);
}

TEST_F(LoraTest, ALiveSessionChangesItsWeightsAndComesBack) {
  write("up", on_block(1, 0.5f, 0.25f));
  write("down", on_block(1, 1.0f, -0.5f));
  write("last", on_block(2, 1.0f, 0.25f));
  const std::vector<float> plain = run(*session_, "");
  EXPECT_EQ(run(*session_, "up"), run_with_weight(1, 0.99f + 0.125f));
  EXPECT_EQ(run(*session_, "up:0.5"), run_with_weight(1, 0.99f + 0.0625f));
  EXPECT_EQ(run(*session_, ""), plain);
  const float first = 0.99f + 0.125f;
  EXPECT_EQ(run(*session_, "up,down:0.5"), run_with_weight(1, first - 0.25f));
  const std::vector<float> both = run(*session_, "up,last");
  EXPECT_NE(both, run(*session_, "up"));
  EXPECT_NE(both, run(*session_, "last"));
  EXPECT_EQ(run(*session_, "last,up"), both);
  EXPECT_EQ(run(*session_, ""), plain);
  EXPECT_EQ(run(*session_, "up:0"), plain);
}

TEST_F(LoraTest, AReplacedFileIsReadAgain) {
  write("style", on_block(1, 0.5f, 0.25f));
  EXPECT_EQ(run(*session_, "style"), run_with_weight(1, 0.99f + 0.125f));
  write("new", on_block(1, 0.5f, 0.5f));
  const std::filesystem::path file = loras_.path() + "/style.safetensors";
  const auto written = std::filesystem::last_write_time(file);
  std::filesystem::rename(loras_.path() + "/new.safetensors", file);
  std::filesystem::last_write_time(file, written + std::chrono::seconds(1));
  EXPECT_EQ(run(*session_, "style"), run_with_weight(1, 0.99f + 0.25f));
}

TEST_F(LoraTest, ARefusedOneLeavesTheSessionAsItWas) {
  write("style", on_block(1, 0.5f, 0.25f));
  write("unknown", on_block(7, 1.0f, 1.0f));
  const std::vector<float> plain = run(*session_, ""), styled = run(*session_, "style");
  (void)fault("unknown");
  EXPECT_EQ(run(*session_, "style"), styled);
  EXPECT_EQ(run(*session_, ""), plain);
}

TEST_F(LoraTest, NothingCachedOfOtherWeightsIsReused) {
  write("style", on_block(1, 0.5f, 0.25f));
  auto fresh = Session::create(model_);
  ASSERT_TRUE(fresh.ok());
  const std::vector<float> expected = run(**fresh, "style", "interval");
  (void)run(*session_, "", "interval");
  EXPECT_EQ(run(*session_, "style", "interval"), expected);
}

TEST_F(LoraTest, SessionsAtTheSameTimeDoNotSeeEachOthersWeights) {
  for (const bool offload : {false, true}) {
    load(offload);
    write("up", on_block(1, 0.5f, 0.25f));
    write("last", on_block(2, 1.0f, 0.25f));
    const std::vector<std::string> texts = {"up", "last", ""};
    std::vector<std::vector<float>> expected;
    for (const std::string& text : texts) expected.push_back(run(*session_, text));
    EXPECT_EQ(expected[0], run_with_weight(1, 0.99f + 0.125f));
    std::vector<std::vector<float>> found(texts.size());
    std::vector<std::thread> others;
    for (std::size_t index = 0; index < texts.size(); ++index) {
      others.emplace_back([&, index] {
        auto session = Session::create(model_);
        ASSERT_TRUE(session.ok());
        for (int turn = 0; turn < 5; ++turn) {
          const std::size_t at = (index + static_cast<std::size_t>(turn)) % texts.size();
          EXPECT_EQ(run(**session, texts[at]), expected[at]);
        }
        found[index] = run(**session, texts[index]);
      });
    }
    for (std::thread& other : others) other.join();
    EXPECT_EQ(found, expected) << (offload ? "offloaded" : "mapped");
  }
}

TEST_F(LoraTest, WeightsThatNothingChangesAreTheBundlesOwn) {
  write("style", on_block(1, 0.5f, 0.25f));
  const auto loras = open_loras(model_->bundle(), *find_loras(loras_.path(), "style"));
  ASSERT_TRUE(loras.ok());
  auto weights = merge_loras(model_->bundle(), *loras, 1);
  ASSERT_TRUE(weights.ok());
  EXPECT_EQ(weights->size(), 1u);
  const auto changed = Model::with_weights(model_, std::move(weights).value());
  EXPECT_NE(changed->weight("blocks.1.weight")->data, model_->weight("blocks.1.weight")->data);
  for (const char* name : {"blocks.0.weight", "blocks.2.weight"}) {
    EXPECT_EQ(changed->weight(name)->data, model_->weight(name)->data);
  }
  EXPECT_EQ(*changed->engine("block"), *model_->engine("block"));
}

/// Bytes of this process's memory that are no file's.
std::int64_t private_bytes() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.rfind("RssAnon:", 0) == 0) return std::stoll(line.substr(8)) * 1024;
  }
  return 0;
}

TEST_F(LoraTest, MemoryIsThatOfTheWeightsThatChange) {
  constexpr std::int64_t kRows = 4096, kColumns = 2048, kRank = 4, kMiB = 1 << 20;
  for (const char* name : {"changed.weight", "first.weight", "second.weight"}) {
    add_weight(name, DType::kBfloat16,
               {Shape{kRows, kColumns}, std::vector<float>(kRows * kColumns, 0.5f)});
  }
  write("large", {{"transformer.changed.lora_A.weight",
                   {Shape{kRank, kColumns}, numbers(kRank * kColumns, 0.011f)}},
                  {"transformer.changed.lora_B.weight",
                   {Shape{kRows, kRank}, numbers(kRows * kRank, 0.007f)}}});
  const auto bundle = Bundle::open(folder_.path());
  ASSERT_TRUE(bundle.ok()) << bundle.status().message();
  const auto loras = open_loras(**bundle, *find_loras(loras_.path(), "large"));
  ASSERT_TRUE(loras.ok()) << loras.status().message();
  malloc_trim(0);  // what earlier tests freed would be taken again, and count as no growth
  const std::int64_t before = private_bytes();
  if (before == 0) GTEST_SKIP() << "this system has no /proc/self/status";
  const auto weights = merge_loras(**bundle, *loras, 1);
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const std::int64_t growth = private_bytes() - before;
  RecordProperty("growth_bytes", std::to_string(growth));
  EXPECT_EQ(weights->at("changed.weight").view().bytes(), 16u * kMiB);
  EXPECT_GE(growth, 15 * kMiB);
  EXPECT_LE(growth, 20 * kMiB) << "the other weights have 32 MiB";
}

TEST_F(LoraTest, EachExpertHasChangesOfItsOwn) {
  for (const char* block : {"0", "1", "2"}) {
    const std::string name = std::string("blocks.") + block + ".weight";
    manifest_["tensors"]["other." + name] = manifest_["tensors"][name];
  }
  manifest_["experts"] = {
      {{"part", "transformer"}, {"prefix", ""}, {"from_timestep", 700.0}},
      {{"part", "transformer_2"}, {"prefix", "other."}, {"from_timestep", 0.0}}};
  load();
  write("first", on_block(1, 0.5f, 0.25f));
  Named second;
  for (const auto& [name, numbers] : on_block(1, 0.5f, 0.25f)) {
    second["transformer_2" + name.substr(name.find('.'))] = numbers;
  }
  write("second", second);
  Named both = on_block(1, 0.5f, 0.25f);
  both.insert(second.begin(), second.end());
  write("both", both);
  const std::vector<float> plain = run(*session_, "");
  EXPECT_NE(run(*session_, "first"), plain);
  EXPECT_NE(run(*session_, "second"), plain);
  EXPECT_NE(run(*session_, "first"), run(*session_, "second"));
  const std::vector<float> all = run_with_weight(1, 0.99f + 0.125f);
  EXPECT_EQ(run(*session_, "both"), all);
  EXPECT_EQ(run(*session_, "first,second"), all);
}

}  // namespace
}  // namespace freewheel

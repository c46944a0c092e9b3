// Checkpoint::Read: random ranges of every format against a slow decoder.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "server/base/strings.h"
#include "server/model/checkpoint.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/file_reader.h"
#include "server/model/gguf_checkpoint.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;

// A file in memory that notes what is read.
class WatchedSource final : public ByteSource {
 public:
  explicit WatchedSource(std::string bytes) : bytes_(std::move(bytes)), memory_("watched.gguf", bytes_) {}
  const std::string& name() const override { return memory_.name(); }
  uint64_t size() const override { return memory_.size(); }
  Status ReadAt(uint64_t offset, void* out, size_t bytes) const override {
    std::lock_guard lock(mutex_);
    total_ += bytes;
    largest_ = std::max(largest_, bytes);
    return memory_.ReadAt(offset, out, bytes);
  }
  void Reset() { total_ = largest_ = 0; }
  uint64_t total() const { return total_; }
  size_t largest() const { return largest_; }

 private:
  const std::string bytes_;
  const MemoryReader memory_;
  mutable std::mutex mutex_;
  mutable uint64_t total_ = 0;  // guarded by mutex_
  mutable size_t largest_ = 0;  // guarded by mutex_
};

// The row of a GGUF file that holds row `row` of Q or K with heads of `dim`: rows of the two halves alternate there.
int64_t GgufRow(int64_t row, int64_t dim) {
  const int64_t in_head = row % dim;
  return in_head < dim / 2 ? row - in_head + 2 * in_head : row - in_head + 2 * (in_head - dim / 2) + 1;
}

struct Source {
  std::string dtype;
  std::unique_ptr<Checkpoint> checkpoint;
  std::vector<RawTensor> raw;              // with Hugging Face's names
  std::shared_ptr<WatchedSource> watched;  // of a GGUF
  int64_t permuted_dim = 0;
};

double Expected(const Source& source, const RawTensor& tensor, int64_t row, int64_t col) {
  const bool permuted = source.permuted_dim > 0 && (tensor.name.find("q_proj") != std::string::npos ||
                                                    tensor.name.find("k_proj") != std::string::npos);
  const int64_t cols = tensor.shape.back();
  return DecodeOne(tensor.dtype, tensor.data, (permuted ? GgufRow(row, source.permuted_dim) : row) * cols + col);
}

void CheckRandomRanges(const Source& source, uint64_t seed, int trials) {
  std::mt19937_64 random(seed);
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (int trial = 0; trial < trials; ++trial) {
    const RawTensor& tensor = source.raw[static_cast<size_t>(below(static_cast<int64_t>(source.raw.size())))];
    const int64_t all_rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1, all_cols = tensor.shape.back();
    int64_t row = below(all_rows), rows = 1 + below(all_rows - row), col = below(all_cols),
            cols = 1 + below(all_cols - col);
    if (trial % 3 == 0) col = 0, cols = all_cols;  // whole rows take another way
    if (trial % 5 == 0) row = 0, rows = all_rows;
    const int64_t stride = cols + (trial % 2 ? below(7) : 0);
    const DType dtype = trial % 4 < 2 ? DType::kF32 : DType::kBF16;
    SCOPED_TRACE(StrCat(source.dtype, " ", tensor.name, " rows ", row, " + ", rows, ", columns ", col, " + ", cols,
                        " as ", Name(dtype)));
    constexpr unsigned char kUntouched = 0xA5;
    std::vector<unsigned char> out(static_cast<size_t>(rows * stride) * SizeOf(dtype), kUntouched);
    uint64_t bytes_read = 5;
    Status status = source.checkpoint->Read(tensor.name, row, rows, col, cols, dtype, out.data(), stride, &bytes_read);
    ASSERT_TRUE(status.ok()) << status.ToString();

    const StorageTraits& traits = Traits(*StorageTypeNamed(tensor.dtype));
    const int64_t blocks =
        (col + cols + traits.block_elements - 1) / traits.block_elements - col / traits.block_elements;
    ASSERT_EQ(bytes_read, 5 + static_cast<uint64_t>(rows * blocks * traits.block_bytes));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < stride; ++c) {
        const unsigned char* at = &out[static_cast<size_t>(r * stride + c) * SizeOf(dtype)];
        if (c >= cols) {
          ASSERT_EQ(*at, kUntouched) << "wrote between rows";
          continue;
        }
        const double expected = Expected(source, tensor, row + r, col + c);
        if (dtype == DType::kF32) {
          float value;
          std::memcpy(&value, at, sizeof value);
          ASSERT_EQ(static_cast<double>(value), expected) << r << ", " << c;
        } else {
          uint16_t value;
          std::memcpy(&value, at, sizeof value);
          ASSERT_EQ(value, NearestBF16(expected)) << r << ", " << c;
        }
      }
    }
  }
}

Source MakeGguf(const std::string& dtype) {
  Source source;
  GgufWriter gguf = SmallGguf(dtype);
  source.dtype = "gguf " + dtype;
  source.watched = std::make_shared<WatchedSource>(gguf.Bytes());
  source.permuted_dim = 64;
  auto checkpoint = OpenGguf(source.watched);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  source.checkpoint = std::move(*checkpoint);
  for (const TensorInfo& info : source.checkpoint->tensors()) {
    RawTensor raw = gguf.tensor(GgufTensorName(info.name));
    raw.name = info.name;
    source.raw.push_back(std::move(raw));
  }
  return source;
}

TEST(CheckpointRead, RandomRangesOfSafetensors) {
  for (const char* dtype : {"F32", "F16", "BF16"}) {
    TempFolder folder;
    Source source;
    ModelFiles model = SmallModel(dtype);
    model.WriteShards(folder, 2);
    source.dtype = dtype;
    auto opened = Checkpoint::Open(folder.path());
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    source.checkpoint = std::move(*opened);
    source.raw = model.tensors;
    CheckRandomRanges(source, 17, 300);
  }
}

TEST(CheckpointRead, RandomRangesOfGguf) {
  for (const char* dtype : {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"}) {
    CheckRandomRanges(MakeGguf(dtype), 18, 12);
  }
}

TEST(CheckpointRead, FromManyThreads) {
  const Source source = MakeGguf("Q4_1");
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i) threads.emplace_back([&source, i] { CheckRandomRanges(source, 100 + i, 3); });
  for (std::thread& thread : threads) thread.join();
}

TEST(CheckpointRead, ConvertsInStepsAndReadsOnlyWhatIsAsked) {
  // One vector of 3 million would do, but the config decides shapes: an embedding of 20 MB.
  GgufWriter gguf = SmallGguf("BF16");
  gguf.Erase("tokenizer.ggml.model");
  std::mt19937_64 random(4);
  gguf.tensor("token_embd.weight").shape = {20000, 256};
  gguf.tensor("token_embd.weight").dtype = "F32";
  gguf.tensor("token_embd.weight").data = RandomStored("F32", 20000 * 256, &random);
  auto watched = std::make_shared<WatchedSource>(gguf.Bytes());
  auto opened = OpenGguf(watched);
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  watched->Reset();
  std::vector<uint16_t> out(20000 * 256);
  uint64_t bytes = 0;
  ASSERT_TRUE(
      (*opened)->Read("model.embed_tokens.weight", 0, 20000, 0, 256, DType::kBF16, out.data(), 256, &bytes).ok());
  EXPECT_EQ(bytes, 20000u * 256 * 4);
  EXPECT_EQ(watched->total(), bytes);
  EXPECT_LE(watched->largest(), size_t{1} << 20);
  watched->Reset();
  ASSERT_TRUE((*opened)->Read("model.embed_tokens.weight", 77, 3, 128, 64, DType::kBF16, out.data(), 64, &bytes).ok());
  EXPECT_EQ(watched->total(), 3u * 64 * 4);
}

TEST(CheckpointRead, RefusesRangesThatAreNotThere) {
  const Source source = MakeGguf("F32");
  float out[4];
  auto read = [&](std::string_view name, int64_t row, int64_t rows, int64_t col, int64_t cols,
                  DType dtype = DType::kF32, int64_t stride = 1000) {
    return source.checkpoint->Read(name, row, rows, col, cols, dtype, out, stride);
  };
  EXPECT_THAT(read("model.nothing", 0, 1, 0, 1).message(), HasSubstr("tensor model.nothing: there is no such tensor"));
  EXPECT_THAT(read("model.norm.weight", 1, 1, 0, 1).message(), HasSubstr("rows 1 + 1 of 1"));
  EXPECT_THAT(read("model.norm.weight", 0, 2, 0, 1).message(), HasSubstr("rows 0 + 2 of 1"));
  EXPECT_FALSE(read("model.norm.weight", -1, 1, 0, 1).ok());
  EXPECT_FALSE(read("model.norm.weight", 0, 1, 255, 2).ok());
  EXPECT_FALSE(read("model.norm.weight", 0, 1, 0, INT64_MAX).ok());
  EXPECT_FALSE(read("model.norm.weight", 0, 1, 0, 1, DType::kI32).ok());
  EXPECT_FALSE(read("model.embed_tokens.weight", 0, 2, 0, 2, DType::kF32, 1).ok());
  EXPECT_TRUE(read("model.embed_tokens.weight", 64, 0, 0, 256).ok());
  EXPECT_TRUE(read("lm_head.weight", 3, 1, 2, 4).ok());
}

TEST(CheckpointRead, AFileThatShrinksIsAnErrorThatNamesIt) {
  TempFolder folder;
  SmallModel().WriteTo(folder);
  auto opened = Checkpoint::Open(folder.path());
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  auto checkpoint = std::move(*opened);
  std::filesystem::resize_file(folder.At("model.safetensors"), 5000);
  std::vector<float> out(32 * 16);
  Status status = checkpoint->Read("lm_head.weight", 0, 32, 0, 16, DType::kF32, out.data(), 16);
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr(folder.At("model.safetensors")));
  EXPECT_THAT(status.message(), HasSubstr("wanted 1024 bytes at offset"));
}

}  // namespace
}  // namespace altiplano

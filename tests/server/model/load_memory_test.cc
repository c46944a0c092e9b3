// What loading takes of the host's memory: the weights, and beside them no more than a piece of a tensor for each
// reader. Nothing that is read for one rank is read for all, and no file is mapped or read whole.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "server/base/strings.h"
#include "server/model/random_checkpoint.h"
#include "server/model/weights.h"
#include "server/model/write_folder.h"

namespace altiplano {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

// Of /proc/self/status, in bytes.
uint64_t StatusOf(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::strtoull(line.c_str() + field.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

// The peak that VmHWM tells of begins anew.
bool ForgetPeak() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << 5;
  clear.close();
  return !clear.fail() && StatusOf("VmHWM") < StatusOf("VmRSS") + 4 * kMiB;
}

class Folder {
 public:
  Folder() {
    std::string name = fs::temp_directory_path() / "altiplano-load-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  std::string model() const { return path_ / "model"; }

 private:
  fs::path path_;
};

TEST(LoadMemory, IsTheWeightsAndAPieceForEachReader) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers take memory of their own";
#endif
  RandomModel model;
  model.config.architecture = "LlamaForCausalLM";
  model.config.max_position = 2048;
  model.config.vocab = 16384;
  model.config.hidden = 1024;
  model.config.layers = 3;
  model.config.q_heads = 8;
  model.config.kv_heads = 4;
  model.config.head_dim = 128;
  model.config.ffn = 4096;
  const Folder folder;
  const Status written = WriteFolder(*MakeRandomCheckpoint(model), folder.model(),
                                     {.max_file_bytes = 40 * kMiB, .progress = {}, .cancelled = {}});
  ASSERT_TRUE(written.ok()) << written.ToString();
  auto checkpoint = Checkpoint::Open(folder.model());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();

  constexpr int kReaders = 2;
  constexpr uint64_t kPieceBytes = 16 * kMiB;  // 8 Mi elements of bf16
  for (const auto& [ranks, dtype] : {std::pair{1, DType::kBF16}, {2, DType::kBF16}, {2, DType::kF32}}) {
    SCOPED_TRACE(StrCat(ranks, " ranks, ", Name(dtype)));
    LoadOptions options;
    options.dtype = dtype;
    options.readers = kReaders;
    std::vector<Shard> shards;
    for (int rank = 0; rank < ranks; ++rank) shards.push_back(*Shard::Make(model.config, rank, ranks));
    if (!ForgetPeak()) GTEST_SKIP() << "this system does not let a process forget its peak of memory";
    const uint64_t before = StatusOf("VmRSS");
    auto weights = LoadAllRanks(**checkpoint, options, shards);
    ASSERT_TRUE(weights.ok()) << weights.status().ToString();
    const uint64_t peak = StatusOf("VmHWM") - before;
    uint64_t bytes = 0;
    for (const LlamaWeights& rank : *weights) bytes += rank.bytes;
    EXPECT_GT(bytes, 150 * kMiB);
    EXPECT_GT(peak, bytes * 9 / 10) << "weights that are not in memory";
    EXPECT_LT(peak, bytes + kReaders * kPieceBytes) << bytes / kMiB << " MiB of weights";
    RecordProperty(StrCat("peak_", ranks, "_", Name(dtype)), StrCat(peak / kMiB, " of ", bytes / kMiB, " MiB"));
  }
}

}  // namespace
}  // namespace altiplano

// config/MODEL-NxGPU.textproto: one for each combination that altiplano plan says fits, and none else.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "server/base/strings.h"
#include "server/bench/capacity.h"
#include "server/cli/config.h"

namespace altiplano::cli {
namespace {

// Eight requests of 8,192 tokens at one time: less is no server.
constexpr bench::Demand kLeast{.context = 8192, .answer_tokens = 512, .concurrency = 8};

void ExpectPlanAgrees(const config::v1::ServerConfig& config, const ModelConfig& model, const bench::GpuGroup& gpus) {
  EXPECT_EQ(config.model().device(), "cuda");
  EXPECT_EQ(config.model().dtype(), "bf16");
  EXPECT_EQ(config.model().tensor_parallel(), static_cast<uint32_t>(gpus.count));
  EXPECT_EQ(config.kv().block_size(), 64u);
  const bench::ServingLimits limits{.block_size = config.kv().block_size(),
                                    .max_running = config.scheduler().max_num_seqs(),
                                    .token_budget = config.scheduler().max_num_batched_tokens()};
  // One request of the longest context fits, and as many sequences of 2,048 tokens as may run.
  const int64_t context = config.model().max_context();
  EXPECT_EQ(PlanCapacity(model, gpus, {.context = context, .answer_tokens = 512, .concurrency = 1}, limits).why_not,
            "");
  EXPECT_EQ(
      PlanCapacity(model, gpus, {.context = 2048, .answer_tokens = 512, .concurrency = limits.max_running}, limits)
          .why_not,
      "");
}

TEST(GpuConfigs, ThereIsOneForEachMachineThatAModelFitsOn) {
  int files = 0;
  for (const char* model : {"8b", "70b", "405b"}) {
    for (int count : {1, 2, 4, 8}) {
      for (const char* gpu : {"h100", "h200"}) {
        const std::string name = StrCat(model, "-", count, "x", gpu, ".textproto");
        SCOPED_TRACE(name);
        const ModelConfig published = PublishedModelConfig(model).value();
        const bench::GpuGroup gpus = bench::ParseGpus(StrCat(count, "x", gpu)).value();
        const bool fits = PlanCapacity(published, gpus, kLeast, {}).why_not.empty();
        const std::string path = StrCat(ALTIPLANO_SOURCE_DIR, "/config/", name);
        ASSERT_EQ(std::filesystem::exists(path), fits);
        if (!fits) continue;
        ++files;
        std::ifstream in(path);
        const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
        auto file = ParseConfig(text, name);
        ASSERT_TRUE(file.ok()) << file.status().ToString();
        auto flags = ParsedFlags::Parse({.name = "serve", .summary = "", .synopsis = "", .notes = "", .flags = {}}, {});
        auto config = ResolveConfig(*flags, &*file);
        ASSERT_TRUE(config.ok()) << config.status().ToString();
        ExpectPlanAgrees(config->values, published, gpus);
      }
    }
  }
  EXPECT_GE(files, 10);
}

}  // namespace
}  // namespace altiplano::cli

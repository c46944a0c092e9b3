#include "server/cli/nodes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <future>
#include <utility>

#include "server/base/strings.h"
#include "server/cli/config.h"
#include "server/cli/version.h"
#include "server/model/fingerprint.h"
#include "tests/server/model/stuck_checkpoint.h"

namespace altiplano::cli {
namespace {

using ::testing::HasSubstr;

config::v1::ServerConfig Parse(const char* text) {
  auto file = ParseConfig(text, "test.textproto");
  EXPECT_TRUE(file.ok()) << file.status().ToString();
  auto flags = ParsedFlags::Parse({.name = "serve", .summary = "", .synopsis = "", .notes = "", .flags = {}}, {});
  EXPECT_TRUE(flags.ok());
  return ResolveConfig(*flags, &*file)->values;
}

TEST(Nodes, AStageEachUnlessToldOtherwise) {
  auto config = Parse("");
  EXPECT_TRUE(ResolveNodes(&config).ok());
  EXPECT_EQ(PipelineStages(config), 1u);
  config = Parse("nodes { count: 3 rank: 2 leader: \"a:1\" }");
  EXPECT_TRUE(ResolveNodes(&config).ok());
  EXPECT_EQ(PipelineStages(config), 3u);
  config = Parse("nodes { count: 3 leader: \"a:1\" } model { pipeline_parallel: 6 }");
  EXPECT_TRUE(ResolveNodes(&config).ok());
  EXPECT_EQ(PipelineStages(config), 6u);
}

TEST(Nodes, ContradictionsAreRefusedByTheirFlags) {
  for (const auto& [text, part] :
       {std::pair{"nodes { count: 2 }", "--nodes 2 needs --leader HOST:PORT"},
        {"nodes { count: 2 rank: 2 leader: \"a:1\" }", "--node-rank is 2"},
        {"nodes { rank: 1 }", "--node-rank is 1"},
        {"nodes { count: 2 leader: \"a:1\" } model { replicas: 2 }", "--replicas and --nodes"},
        {"nodes { count: 2 leader: \"a:1\" } model { pipeline_parallel: 3 }",
         "--pipeline-parallel is 3, with --nodes 2"},
        {"nodes { count: 2 leader: \"a:1\" secret_file: \"/\" }", "--node-secret-file: cannot read /: Is a directory"},
        {"nodes { leader: \"a:1\" }", "--leader is for several nodes, and --nodes is 1"},
        {"nodes { count: 2 leader: \"a:0\" }", "--leader is a:0, must be HOST:PORT with a port that the other nodes"},
        {"nodes { count: 2 leader: \"unix:/x\" }", "--leader is unix:/x, must be HOST:PORT"},
        {"nodes { launcher: \"lws\" }", "LWS_WORKER_INDEX is not set"}}) {
    auto config = Parse(text);
    EXPECT_THAT(ResolveNodes(&config).message(), HasSubstr(part)) << text;
  }
}

TEST(Nodes, TheLauncherFillsInWhatFlagsDoNotSay) {
  setenv("OMPI_COMM_WORLD_RANK", "1", 1);
  setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
  auto config = Parse("nodes { launcher: \"openmpi\" }");
  EXPECT_THAT(ResolveNodes(&config).message(), HasSubstr("needs --leader"));
  config = Parse("nodes { launcher: \"openmpi\" leader: \"a:1\" }");
  EXPECT_TRUE(ResolveNodes(&config).ok());
  EXPECT_EQ(config.nodes().rank(), 1u);
  EXPECT_EQ(config.nodes().count(), 2u);
  EXPECT_EQ(config.nodes().leader(), "a:1");
  unsetenv("OMPI_COMM_WORLD_RANK");
  unsetenv("OMPI_COMM_WORLD_SIZE");
}

TEST(Nodes, TermsAreWhatHasToBeEqualOnAllNodes) {
  const auto checkpoint = std::move(*Checkpoint::Open(ALTIPLANO_SOURCE_DIR "/tests/data/tiny"));
  const auto draft = std::move(*Checkpoint::Open(ALTIPLANO_SOURCE_DIR "/tests/data/tiny-draft"));
  const auto terms = [](const Checkpoint& model, const std::string& more, Device device = Device::kCpu) {
    auto config = Parse(StrCat("nodes { count: 2 leader: \"a:1\" } ", more).c_str());
    return GroupOptionsOf(config, model, device, {})->terms;
  };
  const auto mine = terms(*checkpoint, "");
  EXPECT_EQ(mine.at("version"), StrCat(kVersion, " ", kCommit));
  EXPECT_EQ(mine.at("model"), *Fingerprint(*checkpoint));
  EXPECT_NE(mine, terms(*draft, ""));
  EXPECT_NE(mine, terms(*checkpoint, "", Device::kCuda)) << "whichever of them a flag names";
  EXPECT_NE(mine.at("device"), terms(*checkpoint, "", Device::kCuda).at("device"));
  for (const char* other :
       {"model { dtype: \"f32\" }", "model { tensor_parallel: 2 }", "model { pipeline_parallel: 4 }",
        "model { max_context: 64 }", "model { batch_invariant: true }", "kv { block_size: 32 }",
        "scheduler { max_num_seqs: 3 }", "scheduler { max_num_batched_tokens: 256 }"}) {
    EXPECT_NE(mine, terms(*checkpoint, other)) << other;
  }
  EXPECT_EQ(mine, terms(*checkpoint, "threads { compute: 3 } kv { memory: \"1GiB\" }")) << "as the machine wants it";
}

TEST(Nodes, AFileSystemThatHangsUnderTheFingerprintIsToldOf) {
  auto config = Parse("nodes { count: 2 leader: \"a:1\" } scheduler { start_timeout: \"100ms\" }");
  const auto checkpoint = std::move(*Checkpoint::Open(ALTIPLANO_SOURCE_DIR "/tests/data/tiny"));
  std::promise<void> release;
  const StuckCheckpoint stuck(*checkpoint, "model.norm.weight", release.get_future().share());
  LoadHooks hooks;
  Status told;
  hooks.on_start_hang = [&](const Status& status) {
    told = status;
    release.set_value();
  };
  auto options = GroupOptionsOf(config, stuck, Device::kCpu, hooks);
  ASSERT_TRUE(options.ok()) << "it answers after all: " << options.status().ToString();
  EXPECT_EQ(told.code(), Code::kDeadlineExceeded);
  EXPECT_THAT(told.message(), HasSubstr("the start hangs in reading the model's fingerprint"));
  hooks.on_start_hang = {};
  EXPECT_EQ(options->terms["model"], GroupOptionsOf(config, *checkpoint, Device::kCpu, hooks)->terms["model"]);
}

}  // namespace
}  // namespace altiplano::cli

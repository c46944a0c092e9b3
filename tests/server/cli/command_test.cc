#include "server/cli/command.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "kernels/device.h"
#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/version.h"

namespace altiplano::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

struct Output {
  int code;
  std::string out, err;
};

Output Invoke(std::vector<std::string_view> arguments) {
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  int code = Main(arguments);
  std::fflush(stdout);
  Output output{.code = code, .out = "", .err = ""};
  output.out = ::testing::internal::GetCapturedStdout();
  output.err = ::testing::internal::GetCapturedStderr();
  return output;
}

TEST(Commands, EveryFlagIsWellFormedAndDocumented) {
  for (const Subcommand& subcommand : Subcommands()) {
    const Command& command = subcommand.command;
    EXPECT_NE(subcommand.run, nullptr) << command.name;
    std::set<std::string_view> names;
    for (const Flag& flag : command.flags) {
      std::string where = StrCat(command.name, " --", flag.name);
      EXPECT_TRUE(names.insert(flag.name).second) << where << " is there twice";
      EXPECT_GE(flag.meaning.size(), 8u) << where;
      EXPECT_TRUE(flag.meaning.ends_with('.')) << where;
      if (flag.type == FlagType::kBool) {
        EXPECT_TRUE(flag.default_value == "true" || flag.default_value == "false") << where;
      } else {
        EXPECT_FALSE(flag.example.empty()) << where;
      }
      if (!flag.default_value.empty()) {
        EXPECT_TRUE(CheckValue(flag, flag.default_value).ok()) << where;
      }
    }
  }
}

TEST(Commands, HelpOfEach) {
  for (const Subcommand& subcommand : Subcommands()) {
    std::vector<std::string_view> arguments;
    std::string_view name = subcommand.command.name;
    if (size_t blank = name.find(' '); blank != std::string_view::npos) {
      arguments = {name.substr(0, blank), name.substr(blank + 1), "--help"};
    } else {
      arguments = {name, "--help"};
    }
    Output output = Invoke(arguments);
    EXPECT_EQ(output.code, 0) << name;
    EXPECT_THAT(output.out, HasSubstr(subcommand.command.summary)) << name;
    std::multiset<std::string> headings;  // after an empty line, not indented
    for (size_t at = 0; (at = output.out.find("\n\n", at)) != std::string::npos;) {
      at += 2;
      if (at < output.out.size() && output.out[at] != ' ') {
        headings.insert(output.out.substr(at, output.out.find('\n', at) - at));
      }
    }
    for (const std::string& heading : headings) EXPECT_EQ(headings.count(heading), 1u) << name << ": " << heading;
    EXPECT_THAT(Invoke({"help"}).out, HasSubstr(name));
    arguments.pop_back();
    arguments.insert(arguments.begin(), "help");
    EXPECT_EQ(Invoke(arguments).out, output.out) << name;
  }
}

TEST(Commands, TheFirstWordOfTwoListsTheSecond) {
  for (const std::vector<std::string_view>& arguments :
       {std::vector<std::string_view>{"bench", "--help"}, {"bench", "-h"}, {"help", "bench"}}) {
    const Output output = Invoke(arguments);
    EXPECT_EQ(output.code, 0) << output.err;
    EXPECT_THAT(output.out, HasSubstr("  bench serve "));
    EXPECT_THAT(output.out, HasSubstr("  bench offline "));
    EXPECT_THAT(output.out, Not(HasSubstr("simulate")));
  }
  const Output alone = Invoke({"admin"});
  EXPECT_EQ(alone.code, 64);
  EXPECT_EQ(alone.out, "");
  EXPECT_THAT(alone.err, HasSubstr("  admin dump-flight-record "));
}

TEST(Commands, WrongUsageIsOneLineAnd64) {
  struct {
    std::vector<std::string_view> arguments;
    const char* message;
  } cases[] = {
      {{"serv"}, "serv: unknown command; did you mean serve?"},
      {{"qqqqqqqq"}, "qqqqqqqq: unknown command; see altiplano help"},
      {{"bench", "ofline"}, "bench ofline: unknown command; did you mean bench offline?"},
      {{"serve", "--modle", "x"}, "altiplano serve: unknown flag --modle; did you mean --model?"},
      {{"serve"}, "altiplano serve: needs --model"},
      {{"bench", "ofline", "--json"}, "bench ofline: unknown command; did you mean bench offline?"},
      {{"serve", "--model", "x", "--chat-format", "lama3"},
       "--chat-format is \"lama3\", must be one of auto|none|llama3"},
      {{"chat", "--url", "localhost"}, "--url is \"localhost\", must be HOST:PORT"},
      {{"generate", "--url", "127.0.0.1:1", "--prompt", "x", "--threads", "2"},
       "--threads is of a model loaded here; a server (--url) has its own"},
      {{"tokenize", "--url", "127.0.0.1:1", "--text", "x", "--chat-format", "llama3"},
       "--chat-format is of a model loaded here"},
      {{"tokenize", "--text", "x"}, "needs one of --model"},
      {{"generate", "--prompt", "x"}, "needs one of --model"},
      {{"generate", "--model", "x", "--prompt", "x", "--system", "y"}, "--system needs --chat"},
      {{"bench", "serve", "--metric-percentiles", "101"}, "must be numbers from 0 to 100"},
      {{"bench", "serve", "--request-rate", "fast"}, "--request-rate is \"fast\", must be inf, trace or"},
      {{"bench", "serve", "--goodput", "ttft"}, "--goodput is \"ttft\", must be METRIC:MILLISECONDS"},
      {{"bench", "serve", "--percentile-metrics", "x"}, "--percentile-metrics has \"x\", must be of ttft"},
      {{"bench", "serve", "--dataset-name", "azure"}, "--dataset-name azure needs --dataset-path"},
      {{"bench", "serve", "--dataset-path", "x"}, "--dataset-path needs --dataset-name"},
      {{"bench", "serve", "--burstiness", "0"}, "--burstiness must be above 0"},
      {{"bench", "serve", "--random-range-ratio", "1"}, "--random-range-ratio must be in [0, 1)"},
      {{"simulate", "--result-filename", "/nowhere/x.json"},
       "--result-filename: cannot write /nowhere/x.json: No such file"},
      {{"make-random", "--like", "8b"}, "needs the folder to write"},
      {{"make-random", "--like", "9b", "x"}, "--like"},
      {{"make-random", "--like", "1b", "--layers", "17", "x"}, "layers is 17, must be from 1 to 16"},
      {{"simulate", "--step-cost", "9b"}, "--step-cost: there is no file 9b, and no preset but 8b-h100"},
      {{"simulate", "--block-size", "12"}, "block_size is 12"},
      {{"simulate", "--tenants", "a:weight=0"}, "--tenants: tenant a: weight is \"0\""},
      {{"simulate", "--tenants", "a:max-queued=100000"}, "or raise --max-queued-requests"},
      {{"simulate", "--deadlines", "soon"}, "--deadlines: \"soon\""},
      {{"serve", "--model", "x", "--config", "/nowhere/x.textproto"}, "/nowhere/x.textproto"},
  };
  for (const auto& c : cases) {
    Output output = Invoke(c.arguments);
    EXPECT_EQ(output.code, 64) << c.message;
    EXPECT_THAT(output.err, HasSubstr(c.message));
    EXPECT_EQ(std::count(output.err.begin(), output.err.end(), '\n'), 1) << output.err;
    EXPECT_EQ(output.out, "");
  }
  EXPECT_EQ(Invoke({}).code, 64);
}

TEST(Commands, SimulateRunsTheSchedulerOnAFormula) {
  std::vector<std::string_view> arguments = {
      "simulate", "--num-prompts", "40", "--request-rate", "20",          "--input-len", "300", "--random-prefix-len",
      "200",      "--output-len",  "20", "--goodput",      "ttft:100000", "--json"};
  Output output = Invoke(arguments);
  ASSERT_EQ(output.code, 0) << output.err;
  auto json = ParseJson(output.out);
  ASSERT_TRUE(json.ok()) << output.out;
  EXPECT_EQ((*json)["simulated"], true);
  EXPECT_EQ((*json)["completed"], 40);
  EXPECT_EQ((*json)["good_requests"], 40);
  EXPECT_EQ((*json)["total_output_tokens"], 800);
  EXPECT_GE((*json)["cached_tokens"], 192);
  EXPECT_GE((*json)["mean_step_ms"], 4.3) << "a step reads the weights at least";
  EXPECT_EQ(Invoke(arguments).out, output.out) << "nothing depends on real time";
  for (std::string_view more : {"--kv-tokens", "512"}) arguments.push_back(more);
  output = Invoke(arguments);
  EXPECT_EQ(output.code, 65);
  EXPECT_THAT(output.err, HasSubstr("longer than 512 tokens"));
}

TEST(Commands, SimulateHasThePoliciesOfServe) {
  Output output = Invoke({"simulate",
                          "--num-prompts",
                          "200",
                          "--request-rate",
                          "1000",
                          "--max-num-seqs",
                          "4",
                          "--tenants",
                          "gold:weight=3;free:weight=1,max-queued=20",
                          "--request-tenants",
                          "gold,free",
                          "--priorities",
                          "0,0,1,1",
                          "--priority-ageing",
                          "1s",
                          "--ttft-target",
                          "100ms,5s",
                          "--default-ttft-target",
                          "2s",
                          "--deadlines",
                          "0,0,1ms,0",
                          "--json"});
  EXPECT_EQ(output.code, 1) << "some are refused";
  auto json = ParseJson(output.out);
  ASSERT_TRUE(json.ok()) << output.out << output.err;
  const int full = (*json)["errors"]["RESOURCE_EXHAUSTED TENANT_QUEUE_FULL"]["count"];
  const int hopeless = (*json)["errors"]["DEADLINE_EXCEEDED HOPELESS"]["count"];
  EXPECT_GT(full, 0);
  const int late = (*json)["errors"]["DEADLINE_EXCEEDED DEADLINE"]["count"];
  EXPECT_GT(hopeless, 0);
  EXPECT_EQ(hopeless + late, 50) << "each of gold's second requests";
  EXPECT_EQ((*json)["hopeless"], hopeless);
  EXPECT_EQ((*json)["completed"], 150 - full);
  EXPECT_EQ((*json)["tenants"]["gold"]["generated_tokens"], 50 * 64);
  EXPECT_EQ((*json)["tenants"]["free"]["generated_tokens"], (100 - full) * 64);
  EXPECT_GT((*json)["targets_met"], 0);
  EXPECT_GT((*json)["targets_missed"], 0);
}

TEST(Commands, ReplayShowsAndFitsWhatSimulateRecorded) {
  const std::string record = ::testing::TempDir() + "simulated.flight", cost = ::testing::TempDir() + "fitted.json",
                    trace = ::testing::TempDir() + "trace.json";
  ASSERT_EQ(Invoke({"simulate", "--num-prompts", "30", "--request-rate", "20", "--input-len", "300", "--ttft-target",
                    "200ms,2s", "--priorities", "0,1", "--request-tenants", "blue,green", "--flight-record", record})
                .code,
            0);
  Output output = Invoke({"replay", record, "--write-step-cost", cost, "--perfetto", trace, "--request", "#1"});
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_THAT(output.out, HasSubstr("every decision is as recorded"));
  EXPECT_THAT(output.out, HasSubstr("priority 1, tenant green, TTFT target 2000 ms"));
  EXPECT_THAT(output.err, HasSubstr("fitted.json: "));
  EXPECT_EQ(Invoke({"simulate", "--step-cost", cost}).code, 0);
  std::ifstream in(trace);
  EXPECT_TRUE(ParseJson(std::string(std::istreambuf_iterator<char>(in), {})).ok());

  std::ofstream(record, std::ios::app) << "more";
  output = Invoke({"replay", record});
  EXPECT_EQ(output.code, 65);
  EXPECT_THAT(output.err, HasSubstr("is truncated or damaged"));
  EXPECT_EQ(Invoke({"replay", "nowhere.flight"}).code, 65);
  EXPECT_EQ(Invoke({"replay"}).code, 64);
  EXPECT_THAT(Invoke({"simulate", "--priorities", "0,high"}).err, HasSubstr("\"high\" must be a whole number"));
  for (const char* flag : {"--priorities", "--ttft-target", "--request-tenants", "--deadlines"}) {
    EXPECT_THAT(Invoke({"simulate", flag, "0,"}).err, HasSubstr(std::string(flag) + ": \"0,\" has an empty element"));
  }
  EXPECT_THAT(Invoke({"bench", "offline", "--streams", "1,,8"}).err,
              HasSubstr("--streams: \"1,,8\" has an empty element"));
  EXPECT_THAT(Invoke({"admin", "dump-flight-record", "x"}).err, HasSubstr("needs --url"));
}

TEST(Commands, NoServerIs69AndForHealth1) {
  EXPECT_EQ(Invoke({"health", "--url", "127.0.0.1:1", "--timeout", "50ms"}).code, 1);
  Output output = Invoke({"chat", "--url", "unix:/nowhere/socket"});
  EXPECT_EQ(output.code, 69);
  EXPECT_THAT(output.err, HasSubstr("no server answers at unix:/nowhere/socket"));
}

TEST(Commands, CheckAndPrintConfigLoadNothing) {
  Output output = Invoke({"serve", "--model", "/nowhere", "--check"});
  EXPECT_EQ(output.code, 0) << output.err;
  output = Invoke({"serve", "--model", "/nowhere", "--max-num-seqs", "7", "--print-config"});
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_THAT(output.out, HasSubstr("max_num_seqs: 7"));
  EXPECT_THAT(output.out, HasSubstr("# --max-num-seqs"));
}

TEST(Commands, WhatTheSchedulerCannotDoIsRefusedBeforeAModelIsLoaded) {
  auto refusal = [](std::vector<std::string_view> flags) {
    flags.insert(flags.begin(), {"serve", "--model", "/nowhere"});
    const Output output = Invoke(flags);
    EXPECT_EQ(output.code, 64) << output.err;
    return output.err;
  };
  EXPECT_THAT(refusal({"--max-itl", "1us", "--step-cost", "8b-h200"}), HasSubstr("raise max_itl"));
  EXPECT_THAT(refusal({"--max-itl", "1ms", "--no-learn-step-cost"}), HasSubstr("needs a step_cost"));
  EXPECT_THAT(refusal({"--max-num-batched-tokens", "31", "--block-size", "32"}),
              HasSubstr("is 31, less than a block of 32 tokens; raise it or lower --block-size"));
  EXPECT_THAT(refusal({"--tenants", "a;"}), HasSubstr("--tenants: there is a semicolon too many"));
  EXPECT_THAT(refusal({"--tenants", "a:max-running=9", "--max-num-seqs", "8"}), HasSubstr("raise --max-num-seqs"));
  EXPECT_THAT(refusal({"--tenants", "a:max-queued=9", "--max-queued-requests", "8"}),
              HasSubstr("lower its max-queued"));
  EXPECT_THAT(refusal({"--flight-record-memory", "65535"}), HasSubstr("raise it to 64KiB at least, or 0 for none"));
  EXPECT_THAT(refusal({"--max-model-len", "1", "--check"}),
              HasSubstr("--max-model-len is 1, must hold a prompt token and an answer token"));
  EXPECT_THAT(refusal({"--health-deadline", "0", "--check"}),
              HasSubstr("--health-deadline is \"0\", must be at least 1ms"));
  EXPECT_EQ(Invoke({"serve", "--model", "/nowhere", "--block-size", "1", "--max-model-len", "2", "--check"}).code, 0);
  EXPECT_THAT(refusal({"--step-cost", "/nowhere"}), HasSubstr("--step-cost: there is no file /nowhere"));
  EXPECT_THAT(refusal({"--block-size", "48", "--check"}), HasSubstr(": --block-size is 48, must be a power of two"));
  EXPECT_THAT(refusal({"--device", "cuda", "--max-num-batched-tokens", "63", "--check"}),
              HasSubstr("is 63, less than a block of 64 tokens"));
  EXPECT_EQ(Invoke({"serve", "--model", "/nowhere", "--max-num-batched-tokens", "32", "--block-size", "32", "--tenants",
                    "a;b", "--max-itl", "1s", "--step-cost", "8b-h200", "--check"})
                .code,
            0);
}

TEST(Commands, WhatOtherServersCallAFlagIsUnderstood) {
  const auto err = [](std::vector<std::string_view> arguments) { return Invoke(arguments).err; };
  EXPECT_THAT(err({"serve", "--host", "::"}), HasSubstr("unknown flag --host; here it is --listen HOST:PORT"));
  EXPECT_THAT(err({"serve", "-m", "x"}), HasSubstr("unknown flag -m; here it is --model PATH"));
  EXPECT_THAT(err({"serve", "-ngl", "99"}), HasSubstr("here it is --device cuda"));
  EXPECT_THAT(err({"generate", "--temp", "1"}), HasSubstr("here it is --temperature X"));
  EXPECT_THAT(err({"serve", "--temp", "1"}), Not(HasSubstr("here it is"))) << "serve has no --temperature";
  EXPECT_THAT(err({"serve", "models/x"}),
              HasSubstr("\"models/x\"; a model is named with --model, see altiplano serve"));
  EXPECT_THAT(err({"inspect", "a", "b"}), Not(HasSubstr("--model")));
  // Each points to a flag that serve or generate has.
  for (const std::string_view name : {"--host",
                                      "--port",
                                      "--uds",
                                      "-m",
                                      "--model-path",
                                      "--hf-repo",
                                      "--alias",
                                      "--chat-template",
                                      "--ctx-size",
                                      "--gpu-memory-utilization",
                                      "--mem-fraction-static",
                                      "--n-gpu-layers",
                                      "-ngl",
                                      "--enforce-eager",
                                      "--parallel",
                                      "-np",
                                      "--max-batch-size",
                                      "--batch-size",
                                      "--ubatch-size",
                                      "--max-prefill-tokens"}) {
    EXPECT_THAT(err({"serve", name, "1"}), HasSubstr("; here it is --")) << name;
  }
  for (const std::string_view name : {"--n-predict", "-p", "--system-prompt"}) {
    EXPECT_THAT(err({"generate", name, "1"}), HasSubstr("; here it is --")) << name;
  }
}

TEST(Commands, GpusThatCannotBeMeantAreRefusedBeforeAnyIsLookedFor) {
  for (const std::string_view command : {"serve", "generate"}) {
    const auto refusal = [&](std::vector<std::string_view> flags) {
      flags.insert(flags.begin(), {command, "--model", "/nowhere"});
      if (command == "generate") flags.insert(flags.end(), {"--prompt", "x"});
      const Output output = Invoke(flags);
      EXPECT_EQ(output.code, 64) << output.err;
      return output.err;
    };
    EXPECT_THAT(refusal({"--devices", "0,1"}),
                HasSubstr("--devices names GPUs, and --device is cpu; add --device cuda, or leave --devices out"));
    EXPECT_THAT(refusal({"--devices", "banana", "--device", "cuda"}), HasSubstr("--devices: \"banana\" must be"));
    EXPECT_THAT(refusal({"--devices", "0,1,2", "--device", "auto", "--tp", "2", "--replicas", "2"}),
                HasSubstr("--devices names 3 GPUs, but 4 are needed, one for each of the 2 ranks of 2 replicas"));
    EXPECT_THAT(refusal({"--device", "gpu"}), HasSubstr("did you mean cuda?"));
    EXPECT_THAT(refusal({"--device", "cuda", "--isa", "avx2"}),
                HasSubstr("--isa names instructions of a CPU, and --device is cuda; leave --isa out"));
    EXPECT_THAT(refusal({"--check-ranks"}), HasSubstr("and --tensor-parallel is 1; raise it, or leave --check-ranks"));
    EXPECT_THAT(refusal({"--check-ranks", "--pp", "2"}), HasSubstr("--tensor-parallel is 1"));
  }
  EXPECT_EQ(
      Invoke({"serve", "--model", "/nowhere", "--device", "cuda", "--tp", "2", "--devices", "200,7", "--check"}).code,
      0);
  EXPECT_EQ(Invoke({"serve", "--model", "/nowhere", "--device", "cuda", "--tp", "2", "--devices", "3,7", "--nodes", "2",
                    "--leader", "127.0.0.1:1", "--check"})
                .code,
            0)
      << "each node has one of the stages";
  EXPECT_EQ(Invoke({"serve", "--model", "/nowhere", "--device", "auto", "--isa", "avx2", "--check"}).code, 0);
  EXPECT_EQ(Invoke({"serve", "--model", "/nowhere", "--check-ranks", "--tp", "2", "--check"}).code, 0);
}

TEST(Commands, ModelErrorsAre65AndOneLine) {
  for (std::vector<std::string_view> arguments :
       {std::vector<std::string_view>{"tokenize", "--model", "/nowhere", "--text", "x"},
        std::vector<std::string_view>{"inspect", "/nowhere"}}) {
    Output output = Invoke(arguments);
    EXPECT_EQ(output.code, 65);
    EXPECT_THAT(output.err, HasSubstr("/nowhere"));
    EXPECT_EQ(std::count(output.err.begin(), output.err.end(), '\n'), 1) << output.err;
  }
}

TEST(Commands, TokenizeShowsIdsAndPieces) {
  const char* model = ALTIPLANO_SOURCE_DIR "/tests/data/tiny";
  Output output = Invoke({"tokenize", "--model", model, "--text", "Paris <|eot_id|>", "--json"});
  ASSERT_EQ(output.code, 0) << output.err;
  auto json = ParseJson(output.out);
  ASSERT_TRUE(json.ok()) << output.out;
  EXPECT_EQ((*json)["ids"][0], 1792) << "begin_of_text";
  std::string joined;
  for (size_t i = 1; i < (*json)["pieces"].size(); ++i) joined += (*json)["pieces"][i].get<std::string>();
  EXPECT_EQ(joined, "Paris <|eot_id|>");
  for (const auto& id : (*json)["ids"]) EXPECT_NE(id, 1801) << "text never becomes a special token";
  Output lines = Invoke({"tokenize", "--model", model, "--text", "Paris", "--no-bos"});
  EXPECT_THAT(lines.out, HasSubstr("\t\"P"));
  EXPECT_THAT(lines.out, ::testing::Not(HasSubstr("begin_of_text")));
  Output chat = Invoke({"tokenize", "--model", model, "--text", "Hi", "--chat"});
  EXPECT_THAT(chat.out, HasSubstr("<|start_header_id|>"));
}

TEST(Commands, VersionIsTheProjects) {
  std::ifstream in(ALTIPLANO_SOURCE_DIR "/CMakeLists.txt");
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  EXPECT_THAT(text, HasSubstr(StrCat("VERSION ", kVersion, " ")));
  EXPECT_THAT(Invoke({"version"}).out, HasSubstr(kVersion));
  EXPECT_THAT(Invoke({"version"}).out, HasSubstr(DescribeCuda()));
  auto json = ParseJson(Invoke({"version", "--json"}).out);
  ASSERT_TRUE(json.ok());
  EXPECT_EQ((*json)["version"], kVersion);
  EXPECT_EQ((*json)["commit"], kCommit);
  EXPECT_EQ((*json)["cuda"], DescribeCuda());
  EXPECT_EQ((*json)["grpc"], grpc::Version()) << "the release's, not the core library's own";
}

TEST(Commands, VersionNamesTheCommit) {
  if (std::system("git -C " ALTIPLANO_SOURCE_DIR " rev-parse HEAD >/dev/null 2>&1") != 0) {
    GTEST_SKIP() << "no git, or not a clone of it";
  }
  EXPECT_THAT(kCommit, MatchesRegex("[0-9a-f]{12,}(-dirty)?"));
}

}  // namespace
}  // namespace altiplano::cli

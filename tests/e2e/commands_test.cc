// The client commands against a real server, and those that load a model themselves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "server/base/json.h"
#include "tests/e2e/process_testlib.h"

namespace altiplano::e2e {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kTiny = ALTIPLANO_SOURCE_DIR "/tests/data/tiny";
const std::string kQuestion = "What is the capital of France?";
const std::string kAnswer = "The capital of France is Paris.";  // goldens.json, capital-en

class Commands : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new Server(); }
  static void TearDownTestSuite() { delete server_; }
  void SetUp() override { ASSERT_FALSE(server_->address().empty()) << server_->process().Errors(); }
  static Server* server_;
};
Server* Commands::server_ = nullptr;

TEST_F(Commands, HealthIsZeroWhenServing) {
  Finished health = RunToEnd({"health", "--url", server_->address()});
  EXPECT_EQ(health.code, 0) << health.err;
  EXPECT_EQ(health.out, "SERVING\n");
}

TEST_F(Commands, GenerateIsTheSameHereAndThere) {
  std::vector<std::string> common = {"generate", "--chat", "--temperature", "0", "--prompt", kQuestion};
  auto with = [&common](std::vector<std::string> more) {
    more.insert(more.begin(), common.begin(), common.end());
    return more;
  };
  Finished there = RunToEnd(with({"--url", server_->address()}));
  EXPECT_EQ(there.code, 0) << there.err;
  EXPECT_EQ(there.out, kAnswer + "\n");
  Finished here = RunToEnd(with({"--model", kTiny, "--dtype", "f32", "--kv-memory", "16MiB"}));
  EXPECT_EQ(here.code, 0) << here.err;
  EXPECT_EQ(here.out, kAnswer + "\n");

  Finished json = RunToEnd(with({"--url", "grpc://" + server_->address(), "--json"}));
  auto parsed = ParseJson(json.out);
  ASSERT_TRUE(parsed.ok()) << json.out << json.err;
  EXPECT_EQ((*parsed)["text"], kAnswer);
  EXPECT_EQ((*parsed)["finish_reason"], "eos");
  EXPECT_GT((*parsed)["prompt_tokens"], 10);
}

TEST_F(Commands, GenerateReadsStdinAndObeysStops) {
  Finished all = RunToEnd({"generate", "--url", server_->address(), "--chat", "--temperature", "0"}, kQuestion + "\n");
  EXPECT_EQ(all.out, kAnswer + "\n");
  Finished cut = RunToEnd({"generate", "--url", server_->address(), "--chat", "--temperature", "0", "--stop", "France"},
                          kQuestion);
  EXPECT_EQ(cut.out, "The capital of \n");
  Finished few =
      RunToEnd({"generate", "--url", server_->address(), "--temperature", "0", "--max-tokens", "2", "--json"},
               "Once upon a time");
  auto parsed = ParseJson(few.out);
  ASSERT_TRUE(parsed.ok()) << few.out << few.err;
  EXPECT_EQ((*parsed)["completion_tokens"], 2);
  EXPECT_EQ((*parsed)["finish_reason"], "length");
}

// Each flag of an answer reaches the server, which refuses what is out of range by the field's name.
TEST_F(Commands, GenerateHasPenaltiesAndWhatKeepsAnAnswerGoing) {
  const auto ask = [&](std::vector<std::string> flags) {
    std::vector<std::string> words = {"generate", "--url",  server_->address(), "--chat", "--temperature",
                                      "0",        "--json", "--prompt",         kQuestion};
    words.insert(words.end(), flags.begin(), flags.end());
    return RunToEnd(words);
  };
  const auto tokens = [&](std::vector<std::string> flags) {
    const Finished answer = ask(std::move(flags));
    auto parsed = ParseJson(answer.out);
    EXPECT_TRUE(parsed.ok()) << answer.out << answer.err;
    return parsed.ok() ? std::pair((*parsed)["completion_tokens"].get<int>(), (*parsed)["text"].get<std::string>())
                       : std::pair(-1, std::string());
  };
  const int whole = tokens({}).first;
  EXPECT_EQ(tokens({"--ignore-eos", "--max-tokens", "120"}).first, 120);
  EXPECT_GE(tokens({"--min-tokens", "30", "--max-tokens", "120"}).first, 30);
  ASSERT_LT(whole, 30);
  for (const char* penalty : {"--presence-penalty", "--frequency-penalty"}) {
    EXPECT_NE(tokens({penalty, "2", "--ignore-eos", "--max-tokens", "120"}).second,
              tokens({"--ignore-eos", "--max-tokens", "120"}).second)
        << penalty;
  }
  EXPECT_NE(tokens({"--repetition-penalty", "2", "--ignore-eos", "--max-tokens", "120"}).second,
            tokens({"--ignore-eos", "--max-tokens", "120"}).second);
  for (const char* name : {"repetition", "presence", "frequency"}) {
    const Finished refused = ask({"--" + std::string(name) + "-penalty", "-9"});
    EXPECT_EQ(refused.code, 1) << refused.out;
    EXPECT_THAT(refused.err, HasSubstr(std::string(name) + "_penalty"));
  }
}

TEST_F(Commands, RefusedRequestIsReadableAndExitsOne) {
  Finished finished = RunToEnd({"generate", "--url", server_->address(), "--top-p", "7", "--prompt", "x"});
  EXPECT_EQ(finished.code, 1);
  EXPECT_THAT(finished.err, HasSubstr("INVALID_ARGUMENT"));
  EXPECT_THAT(finished.err, HasSubstr("top_p"));
}

TEST_F(Commands, AnAddressWithoutAdminServiceIsNamed) {
  Finished dump = RunToEnd({"admin", "dump-flight-record", "never.flight", "--url", server_->address()});
  EXPECT_EQ(dump.code, 64);
  EXPECT_THAT(dump.err, HasSubstr(server_->address() + " has no AdminService"));
}

TEST_F(Commands, TokenizeIsTheSameHereAndThere) {
  for (const char* chat : {"--chat", "--bos"}) {
    Finished here = RunToEnd({"tokenize", "--model", kTiny, chat, "--text", "H\xC3\xA4llo, world"});
    Finished there =
        RunToEnd({"tokenize", "--url", server_->address(), chat, "--text", "H\xC3\xA4llo, world", "--json"});
    auto parsed = ParseJson(there.out);
    ASSERT_TRUE(parsed.ok()) << there.out << there.err;
    std::string ids_here, ids_there;
    for (const auto& id : (*parsed)["ids"]) ids_there += id.dump() + " ";
    for (size_t begin = 0, tab; (tab = here.out.find('\t', begin)) != std::string::npos;) {
      ids_here += here.out.substr(begin, tab - begin) + " ";
      begin = here.out.find('\n', tab) + 1;
    }
    EXPECT_EQ(ids_here, ids_there);
    EXPECT_GT((*parsed)["count"], 3);
  }
  Finished repeated = RunToEnd({"tokenize", "--url", server_->address(), "--text", "la la la", "--json"});
  auto parsed = ParseJson(repeated.out);
  ASSERT_TRUE(parsed.ok()) << repeated.out << repeated.err;
  std::string joined;
  for (const std::string piece : (*parsed)["pieces"]) joined += piece;
  EXPECT_EQ(joined, "<|begin_of_text|>la la la");
}

TEST_F(Commands, ChatRemembersResetsAndHelps) {
  Process chat({"chat", "--url", server_->address(), "--temperature", "0"});
  chat.Write(kQuestion + "\n/rest\n\xFF\n/reset\n/help\n/system Be brief.\n" + kQuestion + "\n/quit\nnever read\n");
  EXPECT_EQ(chat.Wait(), 0) << chat.Errors();
  EXPECT_THAT(chat.output(), HasSubstr(kAnswer));
  EXPECT_THAT(chat.output(), HasSubstr("tok/s"));
  EXPECT_THAT(chat.output(), HasSubstr("did you mean /reset?"));
  EXPECT_THAT(chat.output(), HasSubstr("This line is not valid UTF-8."));
  EXPECT_THAT(chat.output(), HasSubstr("/system TEXT"));
}

TEST_F(Commands, InterruptCancelsTheAnswerAndNotTheProgram) {
  Process chat({"chat", "--url", server_->address()});
  ASSERT_TRUE(chat.ReadUntil("> ")) << chat.Errors();
  server_->process().Signal(SIGSTOP);  // an answer that takes as long as we like
  chat.Write("Hello\n");
  bool stopped = false;
  for (int i = 0; i < 200 && !stopped; ++i) {  // one that comes before the question is sent only shows the hint
    chat.Signal(SIGINT);
    stopped = chat.ReadUntil("[stopped", 100);
  }
  server_->process().Signal(SIGCONT);
  EXPECT_TRUE(stopped) << chat.output();
  EXPECT_TRUE(chat.running());
  chat.Write(kQuestion + "\n");
  EXPECT_TRUE(chat.ReadUntil("tok/s]\n")) << chat.output();
  chat.Write("/quit\n");
  EXPECT_EQ(chat.Wait(), 0);
}

TEST_F(Commands, DemoShowsAllAnswersAndTheNumbers) {
  Finished demo = RunToEnd({"demo", "--url", server_->address(), "--prompt", kQuestion, "--prompt", kQuestion});
  EXPECT_EQ(demo.code, 0) << demo.err;
  EXPECT_THAT(demo.out, HasSubstr("1| " + kAnswer));
  EXPECT_THAT(demo.out, HasSubstr("2| " + kAnswer));
  for (const char* part : {"TTFT", "tok/s", "KV cache: at most", "finish eos"}) EXPECT_THAT(demo.out, HasSubstr(part));
}

TEST_F(Commands, BenchServeCountsWhatItAsked) {
  Finished bench = RunToEnd({"bench", "serve", "--url", server_->address(), "--num-prompts", "6", "--max-concurrency",
                             "3", "--input-len", "20", "--output-len", "9", "--json"});
  ASSERT_EQ(bench.code, 0) << bench.err;
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  EXPECT_EQ((*parsed)["completed"], 6);
  EXPECT_EQ((*parsed)["failed"], 0);
  EXPECT_EQ((*parsed)["total_input_tokens"], 120);
  EXPECT_EQ((*parsed)["total_output_tokens"], 54);
  EXPECT_GT((*parsed)["mean_ttft_ms"], 0);
}

TEST_F(Commands, BenchServeAtARateSeesSharedBeginningsAndGoodput) {
  const std::string file = testing::TempDir() + "/bench_result.json";
  Finished bench = RunToEnd({"bench",
                             "serve",
                             "--url",
                             server_->address(),
                             "--num-prompts",
                             "12",
                             "--request-rate",
                             "200",
                             "--burstiness",
                             "0.5",
                             "--seed",
                             "77",
                             "--random-prefix-len",
                             "48",
                             "--input-len",
                             "16",
                             "--output-len",
                             "5",
                             "--goodput",
                             "e2el:600000",
                             "--save-detailed",
                             "--result-filename",
                             file});
  ASSERT_EQ(bench.code, 0) << bench.err;
  EXPECT_THAT(bench.out, HasSubstr("Successful requests:                     12"));
  EXPECT_THAT(bench.out, HasSubstr("Good requests (%):                       100.00"));
  std::stringstream text;
  text << std::ifstream(file).rdbuf();
  auto parsed = ParseJson(text.str());
  ASSERT_TRUE(parsed.ok()) << text.str();
  EXPECT_EQ((*parsed)["total_input_tokens"], 12 * 64);
  EXPECT_EQ((*parsed)["good_requests"], 12);
  EXPECT_GE((*parsed)["cached_tokens"], 48) << "the shared beginning is computed for the first and found by later ones";
  EXPECT_EQ((*parsed)["cached_tokens"].get<int>() % 16, 0);
  for (const char* list : {"ttfts", "itls", "start_times", "cached_lens"})
    EXPECT_EQ((*parsed)[list].size(), 12u) << list;
}

TEST_F(Commands, BenchServeReplaysATraceWithItsSharedBlocks) {
  const std::string file = testing::TempDir() + "/mooncake.jsonl";
  std::ofstream(file) << R"({"timestamp": 0, "input_length": 1024, "output_length": 64, "hash_ids": [1, 2]})"
                      << "\n"
                      << R"({"timestamp": 400000, "input_length": 1024, "output_length": 64, "hash_ids": [1, 3]})"
                      << "\n"
                      << R"({"timestamp": 400000, "input_length": 512000, "output_length": 64, "hash_ids": [)";
  {
    std::ofstream more(file, std::ios::app);
    for (int i = 0; i < 1000; ++i) more << (i > 0 ? ", " : "") << 1000 + i;
    more << "]}\n";
  }
  Finished bench =
      RunToEnd({"bench", "serve", "--url", server_->address(), "--dataset-name", "mooncake", "--dataset-path", file,
                "--request-rate", "trace", "--speed-up", "1000", "--length-scale", "0.0625", "--json"});
  ASSERT_EQ(bench.code, 0) << bench.err;
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  EXPECT_EQ((*parsed)["completed"], 2);
  EXPECT_EQ((*parsed)["total_input_tokens"], 128);
  EXPECT_EQ((*parsed)["total_output_tokens"], 8);
  EXPECT_EQ((*parsed)["cached_tokens"], 32) << "the block of 512 tokens that both begin with, scaled";
  EXPECT_THAT((*parsed)["notes"][0], HasSubstr("1 requests of the dataset were left out"));
}

TEST(BenchServe, ErrorsAreCountedByCode) {
  Server server({"--max-num-seqs", "1", "--max-queued-requests", "1"});
  ASSERT_FALSE(server.address().empty()) << server.process().Errors();
  Finished bench =
      RunToEnd({"bench", "serve", "--url", server.address(), "--num-prompts", "30", "--output-len", "100", "--json"});
  EXPECT_EQ(bench.code, 1);
  EXPECT_THAT(bench.err, HasSubstr("a request failed: RESOURCE_EXHAUSTED"));
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  EXPECT_GE((*parsed)["completed"], 1);
  EXPECT_EQ((*parsed)["errors"]["RESOURCE_EXHAUSTED QUEUE_FULL"]["count"], (*parsed)["failed"]);
  EXPECT_EQ((*parsed)["completed"].get<int>() + (*parsed)["failed"].get<int>(), 30);
}

// --- Load tests that somebody interrupts -----------------------------------------------------------------------------

// The line that bench writes every five seconds: it is sending.
bool WaitUntilItSends(Process& bench) {
  while (bench.running() && bench.Errors().find(" sent, ") == std::string::npos) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return bench.running();
}

void ExpectInterrupted(const Json& json, int64_t requests) {
  EXPECT_EQ(json["interrupted"], true);
  EXPECT_GT(json["completed"], 0);
  EXPECT_GT(json["not_sent"], 0);
  EXPECT_EQ(json["failed"], 0);
  EXPECT_EQ(json["num_prompts"], requests);
  EXPECT_EQ(json["completed"].get<int64_t>() + json["cancelled"].get<int64_t>() + json["not_sent"].get<int64_t>(),
            requests);
}

TEST(BenchInterrupt, ServeReportsWhatHasFinished) {
  Server server;
  ASSERT_FALSE(server.address().empty()) << server.process().Errors();
  const std::string file = testing::TempDir() + "/interrupted.json";
  Process bench({"bench", "serve", "--url", server.address(), "--num-prompts", "100000", "--max-concurrency", "2",
                 "--input-len", "4", "--output-len", "4", "--result-filename", file});
  ASSERT_TRUE(WaitUntilItSends(bench)) << bench.Errors();
  server.process().Signal(SIGSTOP);  // what is live now ends only if it is cancelled
  bench.Signal(SIGINT);
  EXPECT_EQ(bench.Wait(), 130) << bench.Errors();
  server.process().Signal(SIGCONT);
  EXPECT_THAT(bench.output(), HasSubstr("Requests not sent:"));
  EXPECT_THAT(bench.output(), HasSubstr("note: interrupted after"));
  std::stringstream written;
  written << std::ifstream(file).rdbuf();
  auto json = ParseJson(written.str());
  ASSERT_TRUE(json.ok()) << written.str();
  ExpectInterrupted(*json, 100000);
}

TEST(BenchInterrupt, SimulateReportsWhatHasFinished) {
  Json json = {{"completed", 0}};
  // A signal that comes before the simulation ends the program without a report, or before anything has finished.
  for (int wait_ms = 100; json["completed"] == 0 && wait_ms < 20000; wait_ms *= 2) {
    Process simulate({"simulate", "--num-prompts", "100000", "--request-rate", "1", "--output-len", "2000", "--json"});
    ASSERT_TRUE(simulate.WaitUntilTermIsHandled());
    std::this_thread::sleep_for(std::chrono::milliseconds(wait_ms));
    simulate.Signal(SIGINT);
    EXPECT_EQ(simulate.Wait(), 130) << simulate.Errors();
    EXPECT_THAT(simulate.Errors(), HasSubstr("altiplano simulate: interrupted"));
    if (simulate.output().empty()) continue;
    auto parsed = ParseJson(simulate.output());
    ASSERT_TRUE(parsed.ok()) << simulate.output();
    json = *parsed;
  }
  ExpectInterrupted(json, 100000);
}

TEST(BenchInterrupt, InTheWarmUpNothingWasMeasured) {
  Server server;
  ASSERT_FALSE(server.address().empty()) << server.process().Errors();
  std::string output;
  // A signal that comes before the warm-up ends the program without a report.
  for (int wait_ms = 50; output.empty() && wait_ms < 20000; wait_ms *= 2) {
    Process bench({"bench", "serve", "--url", server.address(), "--num-warmups", "100000", "--json"});
    ASSERT_TRUE(bench.WaitUntilTermIsHandled());
    std::this_thread::sleep_for(std::chrono::milliseconds(wait_ms));
    bench.Signal(SIGTERM);
    EXPECT_EQ(bench.Wait(), 130) << bench.Errors();
    output = bench.output();
  }
  auto json = ParseJson(output);
  ASSERT_TRUE(json.ok()) << output;
  EXPECT_EQ((*json)["interrupted"], true);
  EXPECT_EQ((*json)["completed"], 0);
  EXPECT_EQ((*json)["cancelled"], 0);
  EXPECT_EQ((*json)["not_sent"], 100);
  EXPECT_THAT((*json)["notes"].back(), HasSubstr("nothing was measured"));
}

TEST(BenchInterrupt, WhileTheDatasetIsReadItSaysSo) {
  Server server;
  ASSERT_FALSE(server.address().empty()) << server.process().Errors();
  const std::string pipe = testing::TempDir() + "/dataset.pipe";  // that nobody writes to
  ASSERT_TRUE(mkfifo(pipe.c_str(), 0600) == 0 || errno == EEXIST);
  Process bench({"bench", "serve", "--url", server.address(), "--dataset-name", "sharegpt", "--dataset-path", pipe});
  ASSERT_TRUE(bench.WaitUntilTermIsHandled());
  bench.Signal(SIGINT);
  EXPECT_EQ(bench.Wait(), 130);
  EXPECT_THAT(bench.Errors(), HasSubstr("altiplano bench serve: interrupted before anything was sent"));
  EXPECT_EQ(bench.output(), "");
}

TEST(BenchInterrupt, OfflineReportsWhatHasFinished) {
  Process bench({"bench", "offline", "--model", kTiny, "--dataset-name", "random", "--num-prompts", "100000",
                 "--max-concurrency", "2", "--input-len", "4", "--output-len", "4", "--kv-memory", "16MiB", "--json"});
  ASSERT_TRUE(WaitUntilItSends(bench)) << bench.Errors();
  bench.Signal(SIGINT);
  EXPECT_EQ(bench.Wait(), 130) << bench.Errors();
  auto json = ParseJson(bench.output());
  ASSERT_TRUE(json.ok()) << bench.output();
  ExpectInterrupted(*json, 100000);
}

TEST(BenchInterrupt, OfflineReportsTheNumbersOfStreamsThatHaveFinished) {
  // The second number would take a while.
  Process bench({"bench", "offline", "--model", kTiny, "--streams", "1,20000", "--input-len", "2", "--output-len", "9",
                 "--kv-memory", "16MiB", "--max-queued-requests", "30000"});
  ASSERT_TRUE(bench.ReadUntil("\n       1 ")) << bench.Errors();
  bench.Signal(SIGINT);
  EXPECT_EQ(bench.Wait(), 130) << bench.Errors();
  EXPECT_THAT(bench.Errors(), HasSubstr("interrupted"));
  EXPECT_THAT(bench.output(), Not(HasSubstr("\n   20000 ")));
}

TEST(BenchInterrupt, TheSecondSignalEndsItAtOnceWhateverHangs) {
  setenv("ALTIPLANO_FAULT", "0:1:hang", 1);
  Process bench({"bench", "offline", "--model", kTiny, "--dataset-name", "random", "--kv-memory", "16MiB"});
  unsetenv("ALTIPLANO_FAULT");
  ASSERT_TRUE(WaitUntilItSends(bench)) << bench.Errors();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));  // into the first step, which ends no more
  bench.Signal(SIGINT);                                         // cancels, which the step that hangs does not hear of
  bench.Signal(SIGTERM);
  EXPECT_EQ(bench.Wait(), 130) << bench.Errors();
  EXPECT_EQ(bench.output(), "") << "no report";
  EXPECT_THAT(bench.Errors(), HasSubstr("interrupted again: ends without a report"));
}

TEST(Offline, BenchLoadsTheEngineWithADataset) {
  Finished bench = RunToEnd({"bench", "offline", "--model", kTiny, "--dataset-name", "random", "--num-prompts", "9",
                             "--max-concurrency", "4", "--random-prefix-len", "32", "--input-len", "20", "--output-len",
                             "6", "--kv-memory", "16MiB", "--json"});
  ASSERT_EQ(bench.code, 0) << bench.err;
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  EXPECT_EQ((*parsed)["completed"], 9);
  EXPECT_EQ((*parsed)["total_output_tokens"], 54);
  EXPECT_EQ((*parsed)["max_concurrent_requests"], 4);
  EXPECT_GE((*parsed)["cached_tokens"], 32);
  EXPECT_GT((*parsed)["measured_steps"], 0);
  EXPECT_GT((*parsed)["step_cost_error_percent"], 0);
  const std::string step_cost = testing::TempDir() + "/learned_step_cost.json";
  std::ofstream(step_cost) << (*parsed)["step_cost"].dump();
  Finished simulated = RunToEnd({"simulate", "--step-cost", step_cost, "--num-prompts", "5", "--max-model-len", "512"});
  EXPECT_EQ(simulated.code, 0) << simulated.err << "what was learned is a step cost like any other";
  Finished both = RunToEnd({"bench", "offline", "--model", kTiny, "--dataset-name", "random", "--streams", "1"});
  EXPECT_EQ(both.code, 64);
}

TEST(Offline, ACeilingOnItlNeedsACostOrToLearnIt) {
  std::vector<std::string> arguments = {"bench", "offline",     "--model", kTiny,       "--streams",
                                        "2",     "--kv-memory", "16MiB",   "--max-itl", "1s"};
  EXPECT_EQ(RunToEnd(arguments).code, 0) << "what steps cost is learned";
  arguments.push_back("--no-learn-step-cost");
  Finished without = RunToEnd(arguments);
  EXPECT_EQ(without.code, 64) << "wrong usage, nothing about the model";
  EXPECT_THAT(without.err, HasSubstr("max_itl needs a step_cost"));
  for (const char* more : {"--step-cost", ALTIPLANO_SOURCE_DIR "/config/step_cost.json"}) arguments.push_back(more);
  Finished with = RunToEnd(arguments);
  EXPECT_EQ(with.code, 0) << with.err;
}

TEST(Offline, TenantsThatContradictAreRefusedBeforeAnythingIsLoaded) {
  auto refusal = [](const std::string& tenants) {
    Finished bench = RunToEnd({"bench", "offline", "--model", kTiny, "--tenants", tenants});
    EXPECT_NE(bench.code, 0);
    return bench.err;
  };
  EXPECT_THAT(refusal("a:weight=0"), HasSubstr("--tenants: tenant a: weight is \"0\""));
  EXPECT_THAT(refusal("a;a"), HasSubstr("tenant a is listed twice"));
  EXPECT_THAT(refusal("a:max-running=1000"), HasSubstr("lower it or raise --max-num-seqs"));
  EXPECT_THAT(refusal("a:max-queued=100000"), HasSubstr("or raise --max-queued-requests"));
}

TEST(Offline, BenchMeasuresEachNumberOfStreams) {
  Finished bench = RunToEnd({"bench", "offline", "--model", kTiny, "--streams", "1,3", "--input-len", "20",
                             "--output-len", "12", "--kv-memory", "16MiB", "--json"});
  ASSERT_EQ(bench.code, 0) << bench.err;
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  ASSERT_EQ((*parsed)["results"].size(), 2u);
  EXPECT_EQ((*parsed)["results"][1]["streams"], 3);
  EXPECT_GT((*parsed)["results"][1]["decode_tokens_per_second"], 0);
  EXPECT_GT((*parsed)["results"][1]["tokens_per_second"], 0);
}

TEST(Offline, BenchTellsWhatItMeasuredBeforeItFailed) {
  Finished bench =
      RunToEnd({"bench", "offline", "--model", kTiny, "--streams", "1,9", "--input-len", "8", "--output-len", "4",
                "--kv-memory", "16MiB", "--max-num-seqs", "1", "--max-queued-requests", "2", "--json"});
  EXPECT_EQ(bench.code, 1);
  EXPECT_THAT(bench.err, HasSubstr("RESOURCE_EXHAUSTED"));
  const Json json = Json::parse(bench.out);
  ASSERT_EQ(json["results"].size(), 1u);
  EXPECT_EQ(json["results"][0]["streams"], 1);
  EXPECT_EQ(json["interrupted"], false);
}

TEST(Offline, BenchHasNoDecodeRateWhereStreamsTakeTurns) {
  std::vector<std::string> arguments = {"bench",          "offline", "--model",      kTiny, "--streams",   "1,2",
                                        "--input-len",    "8",       "--output-len", "4",   "--kv-memory", "16MiB",
                                        "--max-num-seqs", "1"};
  Finished text = RunToEnd(arguments);
  ASSERT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("\n-: at no time all streams decoded"));
  EXPECT_THAT(text.out, HasSubstr("-              -")) << "of decode and weights";
  arguments.push_back("--json");
  Finished bench = RunToEnd(arguments);
  auto parsed = ParseJson(bench.out);
  ASSERT_TRUE(parsed.ok()) << bench.out;
  EXPECT_GT((*parsed)["results"][0]["decode_tokens_per_second"], 0);
  EXPECT_TRUE((*parsed)["results"][1]["decode_tokens_per_second"].is_null());
  EXPECT_GT((*parsed)["results"][1]["tokens_per_second"], 0);
}

TEST(Offline, BenchLeavesOutTheSumsOfRanks) {
  std::vector<std::string> arguments = {
      "bench", "offline",      "--model", kTiny,         "--streams", "1",      "--input-len",
      "8",     "--output-len", "4",       "--kv-memory", "16MiB",     "--json", "--without-all-reduces"};
  Finished alone = RunToEnd(arguments);
  EXPECT_EQ(alone.code, 64);
  EXPECT_THAT(alone.err, HasSubstr("one rank sums nothing"));
  for (const char* more : {"--tensor-parallel", "2"}) arguments.push_back(more);
  for (const bool summed : {false, true}) {
    if (summed) std::erase(arguments, "--without-all-reduces");
    Finished bench = RunToEnd(arguments);
    ASSERT_EQ(bench.code, 0) << bench.err;
    const Json json = Json::parse(bench.out);
    EXPECT_EQ(json["all_reduces"]["summed"], summed);
    EXPECT_GT(json["all_reduces"]["a_step"], 0);
    EXPECT_GT(json["results"][0]["decode_tokens_per_second"], 0);
  }
}

// By the shell, for what a Process has no pipe for.
int Shell(const std::string& arguments, std::string* errors) {
  const std::string file = ::testing::TempDir() + "/shell-errors";
  const int status = std::system((ALTIPLANO_BINARY_DIR "/altiplano " + arguments + " 2>" + file).c_str());
  std::ostringstream text;
  text << std::ifstream(file).rdbuf();
  *errors = text.str();
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which need threads of their own
TEST(Offline, AThreadThatIsNotToBeHadIsNoBug) {
  // Root has no such limit.
  const std::string limited =
      geteuid() == 0 ? "setpriv --reuid 65532 --clear-groups prlimit --nproc=1 " : "prlimit --nproc=1 ";
  const std::string program = ALTIPLANO_BINARY_DIR "/altiplano";
  if (std::system((limited + program + " version >/dev/null 2>&1").c_str()) != 0) {
    GTEST_SKIP() << "that user cannot run " << program;
  }
  const std::string file = ::testing::TempDir() + "/limited-errors";
  const int status = std::system((limited + program + " serve --model x --check 2>" + file).c_str());
  std::ostringstream errors;
  errors << std::ifstream(file).rdbuf();
  ASSERT_TRUE(WIFEXITED(status)) << errors.str();
  EXPECT_EQ(WEXITSTATUS(status), 69) << errors.str();
  EXPECT_THAT(errors.str(), HasSubstr("altiplano serve: the system refuses a thread or something else: "));
}
#endif

TEST(Offline, WhatCannotBeWrittenOrReadIsAnError) {
  std::string errors;
  for (const std::string& command : {std::string("version"), std::string("serve --help"), "inspect --json " + kTiny,
                                     "tokenize --text x --model " + kTiny}) {
    EXPECT_EQ(Shell(command + " >/dev/full", &errors), 1) << command;
    EXPECT_THAT(errors, HasSubstr(": cannot write to stdout")) << command;
  }
  // A closed one is not given to another file, which would get the answer.
  EXPECT_EQ(Shell("generate --model " + kTiny + " --prompt x --max-tokens 2 >&-", &errors), 1);
  EXPECT_THAT(errors, HasSubstr(": cannot write to stdout: Bad file descriptor"));
  EXPECT_NE(Shell("tokenize --model " + kTiny + " </tmp", &errors), 0);
  EXPECT_THAT(errors, HasSubstr("cannot read stdin: Is a directory"));
}

TEST(Offline, PlanSaysWhatFitsAndWhatWould) {
  Finished fits = RunToEnd({"plan", "--model", "405b", "--gpus", "8xH200", "--json"});
  EXPECT_EQ(fits.code, 0) << fits.err;
  Json json = Json::parse(fits.out);
  EXPECT_EQ(json["fits"], true);
  EXPECT_GT(json["kv_tokens"], 100000);
  Finished not_here = RunToEnd({"plan", "--model", "405b", "--gpus", "4xH200"});
  EXPECT_EQ(not_here.code, 1) << not_here.err;
  EXPECT_THAT(not_here.out, HasSubstr("it fits on 8xH200"));
  Finished short_of_room = RunToEnd({"plan", "--model", "70b", "--gpus", "2xH100"});
  EXPECT_THAT(short_of_room.out, HasSubstr("tokens, 1 request of 8192 needs 8192"));
  Finished more = RunToEnd({"plan", "--model", "405b", "--gpus", "8xH100"});
  EXPECT_THAT(more.out, HasSubstr("it fits on 2 nodes of 8xH100 (--nodes 2)"));
  Finished nodes = RunToEnd({"plan", "--model", "405b", "--gpus", "8xH100", "--nodes", "2", "--json"});
  EXPECT_EQ(nodes.code, 0) << nodes.err;
  json = Json::parse(nodes.out);
  EXPECT_EQ(json["nodes"], 2);
  EXPECT_EQ(json["gpus"], 16);
  EXPECT_EQ(json["tensor_parallel"], 8);
  EXPECT_EQ(json["pipeline_parallel"], 2);
  Finished folder = RunToEnd({"plan", "--model", kTiny, "--context", "128"});
  EXPECT_EQ(folder.code, 0) << folder.err;
  EXPECT_THAT(folder.out, HasSubstr("4.2 million parameters"));
  EXPECT_THAT(folder.out, AllOf(HasSubstr("1 request at one time"), Not(HasSubstr(" 1 requests"))));
  Finished nothing = RunToEnd({"plan", "--model", "/nowhere"});
  EXPECT_EQ(nothing.code, 65);
  EXPECT_THAT(nothing.err, HasSubstr("405b"));
  EXPECT_EQ(RunToEnd({"plan", "--model", "8b", "--gpus", "8xB300"}).code, 64);
  EXPECT_EQ(RunToEnd({"plan", "--model", "8b", "--context", "1"}).code, 64) << "nothing would be left for an answer";
  Finished slow = RunToEnd({"plan", "--model", "8b", "--gpus", "2xL4"});
  EXPECT_EQ(slow.code, 0) << slow.err;
  EXPECT_THAT(slow.out, HasSubstr("2xL4, tensor-parallel"));
}

TEST(Offline, AContextThatTheModelDoesNotHaveIsNamedByItsFlag) {
  Finished generate = RunToEnd({"generate", "--model", kTiny, "--max-model-len", "200000", "--prompt", "x"});
  EXPECT_EQ(generate.code, 64);
  EXPECT_THAT(generate.err, HasSubstr("--max-model-len is 200000, the model was made for 131072 positions"));
}

TEST(Offline, OneThatIsKilledLeavesNothingInTheTemporaryFolder) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(::testing::TempDir()) / ("altiplano-tmpdir-" + std::to_string(getpid()));
  fs::create_directory(folder);
  setenv("TMPDIR", folder.c_str(), 1);
  {
    Process generate({"generate", "--model", kTiny, "--kv-memory", "16MiB", "--log-level", "info"});
    for (int i = 0; i < kPatience * 100 && generate.Errors().find("loading weights") == std::string::npos; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_THAT(generate.Errors(), HasSubstr("loading weights"));
    generate.Signal(SIGKILL);
    EXPECT_EQ(generate.Wait(), 128 + SIGKILL);
  }
  unsetenv("TMPDIR");
  EXPECT_TRUE(fs::is_empty(folder));
  fs::remove_all(folder);
}

TEST(Offline, InspectSaysWhatACheckpointIs) {
  Finished inspect = RunToEnd({"inspect", kTiny});
  EXPECT_EQ(inspect.code, 0) << inspect.err;
  EXPECT_THAT(inspect.out, HasSubstr("LlamaForCausalLM"));
  Finished json = RunToEnd({"inspect", kTiny, "--json"});
  EXPECT_TRUE(ParseJson(json.out).ok()) << json.out;
}

}  // namespace
}  // namespace altiplano::e2e

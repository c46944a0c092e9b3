// A server from READY to exit, by way of gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <regex>
#include <sstream>
#include <thread>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/client.h"
#include "server/scheduler/flight_record.h"
#include "tests/e2e/live_stream_testlib.h"
#include "tests/e2e/process_testlib.h"

namespace altiplano::e2e {
namespace {

namespace v1 = inference::v1;
using cli::Answer;
using cli::Cancellation;
using cli::Client;
using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

const std::string kTiny = ALTIPLANO_SOURCE_DIR "/tests/data/tiny";

std::unique_ptr<Client> ConnectTo(Server& server) {
  if (server.address().empty()) {
    ADD_FAILURE() << "not READY: " << server.process().Errors();
    return nullptr;
  }
  auto client = Client::Connect(server.address(), std::chrono::seconds(kPatience));
  EXPECT_TRUE(client.ok()) << client.status().ToString();
  return client.ok() ? std::move(*client) : nullptr;
}

v1::GenerateRequest Chat(const std::string& text) {
  v1::GenerateRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content(text);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_max_new_tokens(64);
  return request;
}

// Goes on for `tokens` whatever is sampled.
v1::GenerateRequest Endless(uint32_t tokens) {
  v1::GenerateRequest request = Chat("Tell me a story.");
  request.mutable_stopping()->set_max_new_tokens(tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

Status Ask(Client& client, const v1::GenerateRequest& request, std::string* text, Answer* answer = nullptr) {
  Answer unused;
  return client.StreamGenerate(
      request, [&](const v1::Delta& delta) { *text += delta.text(); }, answer != nullptr ? answer : &unused);
}

struct Golden {
  std::string id, question, text;
};

// Goldens that are one user message with an answer that ended, decided by clear margins.
std::vector<Golden> ChatGoldens() {
  std::ifstream in(kTiny + "/goldens.json");
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  auto json = ParseJson(text);
  EXPECT_TRUE(json.ok());
  std::vector<Golden> goldens;
  for (const Json& row : *json) {
    bool one_question = row.contains("messages") && !row.contains("tools") && row["messages"].size() == 1 &&
                        row["messages"][0]["role"] == "user" && row["messages"][0].size() == 2;
    if (!one_question || row["stopped"] != true || row["min_margin"] < 0.05) continue;
    goldens.push_back({row["id"], row["messages"][0]["content"], row["greedy_text"]});
  }
  return goldens;
}

// One server for all tests that leave it as they found it.
class Serve : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    server_ = new Server({"--admin-listen", "127.0.0.1:0"});
    client_ = ConnectTo(*server_).release();
  }
  static void TearDownTestSuite() {
    delete client_;
    delete server_;
  }
  void SetUp() override { ASSERT_NE(client_, nullptr); }

  static Server* server_;
  static Client* client_;
};
Server* Serve::server_ = nullptr;
Client* Serve::client_ = nullptr;

TEST_F(Serve, ReadyLineSaysWhereWhatAndHowMuch) {
  std::smatch match;
  const std::string line = server_->ready_line();
  ASSERT_TRUE(
      std::regex_match(line, match,
                       std::regex("READY address=127\\.0\\.0\\.1:([0-9]+) admin=127\\.0\\.0\\.1:([0-9]+) model=tiny "
                                  "kv_tokens=([0-9]+) seconds=([0-9]+\\.[0-9]+)")))
      << line;
  EXPECT_GT(std::stoi(match[1]), 0);
  auto load = client_->GetLoad();
  ASSERT_TRUE(load.ok()) << load.status().ToString();
  EXPECT_EQ(std::stoull(match[3]), load->kv_blocks_total() * load->kv_block_tokens());
  // 64 MiB of f32 K and V: 4 layers, 4 heads of 64.
  EXPECT_EQ(std::stoull(match[3]), (64ull << 20) / (2 * 4 * 4 * 64 * 4));
}

TEST_F(Serve, StreamedAnswersEqualTheGoldensAllAtOnce) {
  std::vector<Golden> goldens = ChatGoldens();
  ASSERT_GE(goldens.size(), 8u);
  std::vector<std::string> texts(goldens.size());
  std::vector<Status> statuses(goldens.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < goldens.size(); ++i) {
    threads.emplace_back([&, i] { statuses[i] = Ask(*client_, Chat(goldens[i].question), &texts[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < goldens.size(); ++i) {
    EXPECT_TRUE(statuses[i].ok()) << statuses[i].ToString();
    EXPECT_EQ(texts[i], goldens[i].text) << goldens[i].id;
  }
}

TEST_F(Serve, HealthOfServerAndServices) {
  for (const char* service : {"", "altiplano.inference.v1.InferenceService", "altiplano.inference.v1.StatusService"}) {
    auto health = client_->Health(service, std::chrono::seconds(kPatience));
    ASSERT_TRUE(health.ok()) << service << ": " << health.status().ToString();
    EXPECT_EQ(*health, "SERVING") << service;
  }
  EXPECT_EQ(client_->Health("no.such.Service", std::chrono::seconds(kPatience)).status().code(), Code::kNotFound);
}

TEST_F(Serve, ErrorsCarryTheirDetails) {
  v1::GenerateRequest request = Chat("x");
  request.mutable_sampling()->set_top_p(1.5f);
  std::string text;
  Status status = Ask(*client_, request, &text);
  EXPECT_EQ(status.code(), Code::kInvalidArgument) << status.ToString();
  ASSERT_NE(status.detail(), nullptr);
  ASSERT_FALSE(status.detail()->field_violations.empty());
  EXPECT_THAT(status.detail()->field_violations[0].field, HasSubstr("top_p"));
  EXPECT_THAT(cli::DescribeError(status), HasSubstr("INVALID_ARGUMENT"));
}

TEST_F(Serve, TwoHundredRandomCancelsLeaveThePoolFull) {
  std::mt19937 random(7);
  std::vector<int> delays;
  for (int i = 0; i < 200; ++i) delays.push_back(static_cast<int>(random() % 12));
  std::atomic<size_t> next = 0;
  std::atomic<int> cancelled = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < 10; ++i) {
    callers.emplace_back([&] {
      for (size_t index = next++; index < delays.size(); index = next++) {
        Cancellation cancellation;
        std::thread canceller([&, index] {
          std::this_thread::sleep_for(milliseconds(delays[index]));
          cancellation.Cancel();
        });
        Answer answer;
        Status status = client_->StreamGenerate(
            Endless(4000), [](const v1::Delta&) {}, &answer, &cancellation);
        canceller.join();
        if (status.code() == Code::kCancelled) ++cancelled;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(cancelled, 200);
  v1::Load load;
  EXPECT_TRUE(Eventually([&] {
    load = client_->GetLoad().value();
    return load.kv_blocks_used() == 0 && load.running_requests() == 0 && load.waiting_requests() == 0;
  })) << load.DebugString();
  std::string text;
  Golden golden = ChatGoldens().front();
  EXPECT_TRUE(Ask(*client_, Chat(golden.question), &text).ok());
  EXPECT_EQ(text, golden.text) << "and it still answers";
}

TEST(Drain, LiveStreamFinishesNewOnesAreRefusedExitIsZero) {
  Server server({"--drain-timeout", "10m"});  // sanitizers are slow
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  std::atomic<bool> started = false;
  Answer answer;
  Status status;
  std::thread stream([&] {
    status = client->StreamGenerate(
        Endless(1500), [&](const v1::Delta&) { started = true; }, &answer);
  });
  ASSERT_TRUE(Eventually([&] { return started.load(); }));
  server.process().Signal(SIGTERM);
  EXPECT_TRUE(Eventually([&] { return client->Health("", std::chrono::seconds(kPatience)).value() == "NOT_SERVING"; }));
  std::string text;
  Status refused = OkStatus();
  EXPECT_TRUE(Eventually([&] { return !(refused = Ask(*client, Chat("x"), &text)).ok(); }));
  EXPECT_EQ(refused.code(), Code::kUnavailable) << refused.ToString();
  stream.join();
  EXPECT_TRUE(status.ok()) << status.ToString();
  EXPECT_EQ(answer.tokens, 1500u);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
  EXPECT_EQ(server.process().output(), server.ready_line() + "\n") << "one line on stdout in all";
}

TEST(Drain, SecondSignalStopsAtOnceAndExitsZero) {
  Server server;
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  std::atomic<bool> started = false;
  Answer answer;
  Status status;
  std::thread stream([&] {
    status = client->StreamGenerate(
        Endless(60000), [&](const v1::Delta&) { started = true; }, &answer);
  });
  ASSERT_TRUE(Eventually([&] { return started.load(); }));
  server.process().Signal(SIGTERM);
  EXPECT_TRUE(Eventually([&] { return client->Health("", std::chrono::seconds(kPatience)).value() == "NOT_SERVING"; }));
  server.process().Signal(SIGTERM);
  stream.join();
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  EXPECT_LT(answer.tokens, 60000u);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
}

TEST(Drain, TimeoutEndsWhatStillRuns) {
  Server server({"--drain-timeout", "50ms"});
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  std::atomic<bool> started = false;
  Answer answer;
  Status status;
  std::thread stream([&] {
    status = client->StreamGenerate(
        Endless(60000), [&](const v1::Delta&) { started = true; }, &answer);
  });
  ASSERT_TRUE(Eventually([&] { return started.load(); }));
  server.process().Signal(SIGINT);  // as good as SIGTERM
  stream.join();
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
}

TEST(Signals, AReaderThatGoesEndsNothingAndAHangUpDrains) {
  Server server({"--log-level", "info"});
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  server.process().Signal(SIGPIPE);  // what a write to a broken pipe sends
  std::string text;
  EXPECT_TRUE(Ask(*client, Chat("x"), &text).ok());
  server.process().Signal(SIGHUP);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
  EXPECT_THAT(server.process().Errors(), HasSubstr("draining"));
}

// Half of them while it starts, half with live streams.
TEST(Signals, TermAtRandomMomentsExitsZero) {
  const char* wanted = std::getenv("ALTIPLANO_E2E_SIGTERMS");
  int rounds = wanted != nullptr ? std::atoi(wanted) : 15;
  std::mt19937 random(11);
  for (int round = 0; round < rounds; ++round) {
    Server server;
    ASSERT_TRUE(server.process().WaitUntilTermIsHandled()) << server.process().Errors();
    std::vector<std::thread> streams;
    std::unique_ptr<Client> client;
    if (round % 2 == 1) {
      client = ConnectTo(server);
      ASSERT_NE(client, nullptr);
      for (int i = 0; i < 4; ++i) {
        streams.emplace_back([&] {
          std::string text;
          (void)Ask(*client, Endless(100), &text);
        });
      }
    }
    auto delay = std::chrono::microseconds(random() % 60000);
    std::this_thread::sleep_for(delay);
    server.process().Signal(SIGTERM);
    for (std::thread& stream : streams) stream.join();
    ASSERT_EQ(server.process().Wait(), 0) << "round " << round << ", after " << delay.count() << " us\n"
                                          << server.process().Errors();
  }
}

class FaultDrill : public ::testing::Test {
 protected:
  // Serves the tiny model, one of whose ranks fails as `fault` says, and asks for an endless answer.
  Status AskUntilItFails(const char* fault, const char* on_failure, const std::vector<std::string>& more = {},
                         const char* ranks = "2") {
    setenv("ALTIPLANO_FAULT", fault, 1);
    std::vector<std::string> flags = {"--tp", ranks, "--step-deadline", "3s", "--on-engine-failure", on_failure};
    flags.insert(flags.end(), more.begin(), more.end());
    server_ = std::make_unique<Server>(flags);
    unsetenv("ALTIPLANO_FAULT");
    client_ = ConnectTo(*server_);
    if (client_ == nullptr) return Status(Code::kInternal, "not READY");
    std::string text;
    return Ask(*client_, Endless(60000), &text);
  }

  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(FaultDrill, ARankThatThrowsEndsTheProgramWithExit75AndLeavesItsRecord) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "flight_records";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directory(folder);
  Status status = AskUntilItFails("1:40:throw", "exit", {"--flight-record-dir", folder.string()});
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  EXPECT_EQ(status.reason(), "ENGINE_DOWN");
  EXPECT_EQ(server_->process().Wait(), 75) << server_->process().Errors();
  EXPECT_THAT(server_->process().Errors(), HasSubstr(R"("engine failed","replica":0,)"));
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path());
  ASSERT_EQ(files.size(), 1u);
  std::ifstream in(files[0], std::ios::binary);
  auto record = ParseFlightRecord(std::string(std::istreambuf_iterator<char>(in), {}));
  ASSERT_TRUE(record.ok()) << record.status().ToString();
  uint64_t steps = 0;
  for (const FlightFrame& frame : record->frames) {
    if (const auto* result = std::get_if<FlightResult>(&frame)) steps = result->step;
  }
  EXPECT_GT(steps, 30u);  // the fault is in step 40
  std::filesystem::remove_all(folder);
}

// With the deadlines that nobody has changed.
TEST(Health, ARankThatHangsIsSeenLongBeforeTheProgramEnds) {
  setenv("ALTIPLANO_FAULT", "1:40:hang", 1);
  Server server({"--tp", "2"});
  unsetenv("ALTIPLANO_FAULT");
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  LiveStream stream(client.get());
  ASSERT_TRUE(stream.WaitForFirstToken());
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(Eventually([&] { return client->Health("", std::chrono::seconds(kPatience)).value() == "NOT_SERVING"; }));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10)) << "5 s, and some for a busy machine";
  EXPECT_TRUE(server.process().running()) << server.process().Errors();
  server.process().Signal(SIGKILL);  // and the stream ends
}

TEST_F(FaultDrill, ARankThatHangsEndsTheProgramWithExit75) {
  Status status = AskUntilItFails("1:40:hang", "exit");
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  EXPECT_EQ(server_->process().Wait(), 75) << server_->process().Errors();
}

TEST_F(FaultDrill, TheOnlyRankThatHangsEndsTheProgramWithExit75) {
  Status status = AskUntilItFails("0:40:hang", "exit", {}, "1");
  EXPECT_EQ(status.reason(), "ENGINE_DOWN") << status.ToString();
  EXPECT_THAT(status.message(), HasSubstr("rank 0 hangs"));
  EXPECT_EQ(server_->process().Wait(), 75) << server_->process().Errors();
}

// Before READY there is no client to tell.
TEST(Start, ARankThatHangsInItsWarmUpEndsTheProgramWithExit75) {
  for (const std::vector<std::string>& ranks : {std::vector<std::string>{"--tp", "2"}, {"--pp", "2"}}) {
    std::vector<std::string> flags = {"--step-deadline", "1s", "--start-timeout", "2s"};
    flags.insert(flags.end(), ranks.begin(), ranks.end());
    setenv("ALTIPLANO_FAULT", "1:0:hang", 1);
    Server server(flags);
    unsetenv("ALTIPLANO_FAULT");
    EXPECT_EQ(server.process().Wait(), 75) << server.process().Errors();
    EXPECT_EQ(server.process().output(), "") << "not READY";
    EXPECT_THAT(server.process().Errors(), HasSubstr(R"("serve failed","error":"rank 1 hangs in the warm-up)"));
  }
}

// The warm-up cannot be left: the log says so while it is waited for, and the second signal leaves it.
TEST(Start, ASignalIsAnsweredAtOnceInTheLog) {
  setenv("ALTIPLANO_FAULT", "0:0:hang", 1);
  Server server({"--start-timeout", "0"});
  unsetenv("ALTIPLANO_FAULT");
  ASSERT_TRUE(server.process().WaitUntilTermIsHandled());
  const auto logged = [&](std::string_view text) {
    return Eventually([&] { return server.process().Errors().find(text) != std::string::npos; });
  };
  ASSERT_TRUE(logged("hanging on purpose"));
  server.process().Signal(SIGINT);
  EXPECT_TRUE(logged(R"("a signal: the start ends as soon as it can","signal":"SIGINT","waits_for":"the warm-up")"));
  EXPECT_THAT(server.process().Errors(), HasSubstr(R"("a_second_signal":"ends the program within 5 s")"));
  server.process().Signal(SIGTERM);
  EXPECT_TRUE(logged(R"("a second signal: the program ends within 5 s","signal":"SIGTERM","waits_for":"the warm-up")"));
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
}

// Nothing is to be drained or given back yet.
TEST(Start, OneSignalEndsAProgramWhoseConfigurationDoesNotCome) {
  const std::string fifo = ::testing::TempDir() + "/altiplano-fifo-" + std::to_string(getpid());
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  Process process({"serve", "--config", fifo});
  ASSERT_TRUE(process.WaitUntilTermIsHandled());
  process.Signal(SIGTERM);
  EXPECT_EQ(process.Wait(), 0) << process.Errors();
  unlink(fifo.c_str());
}

// Made again, the rank fails again: here for want of its weights.
TEST_F(FaultDrill, ARestartThatFailsEndsTheProgramWithExit75) {
  namespace fs = std::filesystem;
  const fs::path model = fs::path(::testing::TempDir()) / StrCat("altiplano-restart-", getpid());
  fs::copy(kTiny, model);
  setenv("ALTIPLANO_FAULT", "0:40:throw", 1);
  Server server({"--on-engine-failure", "restart"}, model);
  unsetenv("ALTIPLANO_FAULT");
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  fs::resize_file(model / "model.safetensors", 1000);
  std::string text;
  EXPECT_EQ(Ask(*client, Endless(60000), &text).reason(), "ENGINE_DOWN");
  EXPECT_EQ(server.process().Wait(), 75) << server.process().Errors();
  EXPECT_THAT(server.process().Errors(), HasSubstr("the engine cannot start again"));
  fs::remove_all(model);
}

TEST_F(FaultDrill, RestartServesAgain) {
  Status status = AskUntilItFails("1:40:throw", "restart");
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  std::string text;
  EXPECT_TRUE(Eventually([&] { return Ask(*client_, Chat("Hello"), &text).ok(); })) << server_->process().Errors();
  EXPECT_NE(text, "");
  server_->process().Signal(SIGTERM);
  EXPECT_EQ(server_->process().Wait(), 0) << server_->process().Errors();
}

TEST_F(FaultDrill, StayAnswersNotServingUntilStopped) {
  Status status = AskUntilItFails("0:40:throw", "stay");
  EXPECT_EQ(status.code(), Code::kUnavailable) << status.ToString();
  Finished health = RunToEnd({"health", "--url", server_->address()});
  EXPECT_EQ(health.code, 1) << health.out << health.err;
  EXPECT_THAT(health.out + health.err, HasSubstr("NOT_SERVING"));
  server_->process().Signal(SIGTERM);
  EXPECT_EQ(server_->process().Wait(), 0) << server_->process().Errors();
}

// As of a server that has lived longer than its ring.
TEST(FlightRecordOfAServer, IsReplayedFromACheckpointOnceItsOldestStepsHaveLeft) {
  Server server({"--admin-listen", "127.0.0.1:0", "--flight-record-memory", "64KiB"});
  ASSERT_FALSE(server.address().empty()) << server.process().Errors();
  std::smatch admin;
  ASSERT_TRUE(std::regex_search(server.ready_line(), admin, std::regex("admin=(\\S+)"))) << server.ready_line();
  const Finished load = RunToEnd({"bench", "serve", "--url", server.address(), "--num-prompts", "300", "--input-len",
                                  "20", "--output-len", "8", "--max-concurrency", "4"});
  ASSERT_EQ(load.code, 0) << load.err;
  const std::string file = ::testing::TempDir() + "/long.flight";
  const Finished dump = RunToEnd({"admin", "dump-flight-record", file, "--url", admin[1].str()});
  ASSERT_EQ(dump.code, 0) << dump.err;
  const Finished replay = RunToEnd({"replay", file});
  EXPECT_EQ(replay.code, 0) << replay.err;
  EXPECT_THAT(replay.out, HasSubstr("steps before them have left the ring"));
  EXPECT_THAT(replay.out, HasSubstr("the first checkpoint, is shown as recorded and not replayed"));
  EXPECT_THAT(replay.out, HasSubstr("every decision is as recorded"));
}

// What every fault that ends a process looks like from outside.
TEST(Crash, LeavesARecordThatReplays) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "crash_records";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directory(folder);
  Server server({"--flight-record-dir", folder.string()});
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  std::string text;
  ASSERT_TRUE(Ask(*client, Endless(20), &text).ok());
  std::thread stream([&] {
    std::string more;
    (void)Ask(*client, Endless(60000), &more);
  });
  std::this_thread::sleep_for(milliseconds(100));  // so that it is under way, as a rule
  server.process().Signal(SIGSEGV);
  stream.join();
  const int code = server.process().Wait();
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  EXPECT_NE(code, 0);  // the sanitizer's handler comes after ours
#else
  EXPECT_EQ(code, 128 + SIGSEGV);
#endif
  std::smatch said;
  const std::string errors = server.process().Errors();
  ASSERT_TRUE(
      std::regex_search(errors, said, std::regex("altiplano: SIGSEGV: the scheduler's last steps are in (\\S+),")))
      << errors;
  EXPECT_EQ(std::filesystem::path(said[1].str()).parent_path(), folder);
  const Finished replay = RunToEnd({"replay", said[1].str()});
  EXPECT_EQ(replay.code, 0) << replay.err;
  EXPECT_THAT(replay.out, HasSubstr("every decision is as recorded"));
  std::filesystem::remove_all(folder);
}

// Two replicas of one rank each; the second one's rank fails once.
TEST(Replicas, OneIsLostTheOtherServesAndTheProgramDrains) {
  setenv("ALTIPLANO_FAULT", "1:40:throw", 1);
  Server server({"--replicas", "2"});
  unsetenv("ALTIPLANO_FAULT");
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  auto load = client->GetLoad();
  ASSERT_TRUE(load.ok());
  ASSERT_EQ(load->replicas_size(), 2);
  EXPECT_EQ(load->kv_blocks_total(), load->replicas(0).kv_blocks_total() + load->replicas(1).kv_blocks_total());
  std::vector<Status> statuses(2);
  std::vector<std::thread> streams;
  for (Status& status : statuses) {
    streams.emplace_back([&] {
      std::string text;
      status = Ask(*client, Endless(400), &text);
    });
  }
  for (std::thread& stream : streams) stream.join();
  std::sort(statuses.begin(), statuses.end(), [](const Status& a, const Status& b) { return a.ok() > b.ok(); });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0].ToString();
  EXPECT_EQ(statuses[1].reason(), "ENGINE_DOWN") << statuses[1].ToString();
  EXPECT_THAT(statuses[1].message(), HasSubstr("replica 1 failed: "));
  EXPECT_EQ(client->Health("", std::chrono::seconds(kPatience)).value(), "SERVING");
  load = client->GetLoad();
  ASSERT_TRUE(load.ok());
  EXPECT_TRUE(load->replicas(0).healthy());
  EXPECT_FALSE(load->replicas(1).healthy());
  for (const Golden& golden : ChatGoldens()) {
    std::string text;
    EXPECT_TRUE(Ask(*client, Chat(golden.question), &text).ok());
    EXPECT_EQ(text, golden.text) << golden.id;
  }
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().Errors();
  EXPECT_THAT(server.process().Errors(), HasSubstr(R"("engine failed","replica":1,)"));
}

TEST(Replicas, AnOverdueOneGetsNothingNew) {
  setenv("ALTIPLANO_FAULT", "1:40:hang", 1);
  Server server({"--replicas", "2", "--health-deadline", "500ms", "--step-deadline", "10m"});
  unsetenv("ALTIPLANO_FAULT");
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  LiveStream first(client.get(), 400), second(client.get(), 400);
  EXPECT_TRUE(Eventually([&] { return !client->GetLoad().value().replicas(1).healthy(); }));
  for (const Golden& golden : ChatGoldens()) {
    std::string text;
    EXPECT_TRUE(Ask(*client, Chat(golden.question), &text).ok());
    EXPECT_EQ(text, golden.text) << golden.id;
  }
  const v1::Load load = client->GetLoad().value();
  EXPECT_TRUE(load.replicas(0).healthy());
  EXPECT_EQ(load.replicas(1).running_requests() + load.replicas(1).waiting_requests(), 1u);
  EXPECT_EQ(client->Health("", std::chrono::seconds(kPatience)).value(), "SERVING");
  server.process().Signal(SIGKILL);  // and the stream that hangs ends
}

TEST(Replicas, ALostOneIsMadeAgainWithTheSharedWeights) {
  setenv("ALTIPLANO_FAULT", "0:10:throw", 1);
  Server server({"--replicas", "2", "--on-engine-failure", "restart"});
  unsetenv("ALTIPLANO_FAULT");
  auto client = ConnectTo(server);
  ASSERT_NE(client, nullptr);
  std::string text;
  EXPECT_EQ(Ask(*client, Endless(400), &text).reason(), "ENGINE_DOWN");
  EXPECT_TRUE(Eventually([&] {
    auto load = client->GetLoad();
    return load.ok() && load->replicas(0).healthy() && load->replicas(1).healthy();
  }));
  const Golden golden = ChatGoldens().front();
  for (int i = 0; i < 2; ++i) {
    text.clear();
    EXPECT_TRUE(Ask(*client, Chat(golden.question), &text).ok());
    EXPECT_EQ(text, golden.text);
  }
}

TEST(FlightRecords, AWarningSaysWhatAFullCacheNeeds) {
  const std::string_view warning = "flight records of a full KV cache cannot be replayed";
  Server small({"--flight-record-memory", "64KiB", "--block-size", "4"}), usual;
  ASSERT_NE(small.address(), "");
  ASSERT_NE(usual.address(), "");
  EXPECT_THAT(small.process().Errors(), HasSubstr(warning));
  EXPECT_THAT(usual.process().Errors(), Not(HasSubstr(warning)));
}

TEST(BadStart, ModelErrorsAreOneLineAndExit65) {
  namespace fs = std::filesystem;
  fs::path folder = fs::path(::testing::TempDir()) / StrCat("altiplano-e2e-", getpid());
  auto copy = [&](const char* name) {
    fs::create_directories(folder);
    fs::copy(kTiny, folder / name);
    return folder / name;
  };
  auto write = [](const fs::path& path, std::string_view text) { std::ofstream(path) << text; };
  fs::path truncated = copy("truncated");
  fs::resize_file(truncated / "model.safetensors", fs::file_size(truncated / "model.safetensors") - 100);
  fs::path bad_config = copy("bad_config");
  write(bad_config / "config.json", R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})");
  fs::path no_tokenizer = copy("no_tokenizer");
  fs::remove(no_tokenizer / "tokenizer.json");
  fs::path empty_tokenizer = copy("empty_tokenizer"), cut_tokenizer = copy("cut_tokenizer");
  fs::resize_file(empty_tokenizer / "tokenizer.json", 0);
  fs::resize_file(cut_tokenizer / "tokenizer.json", 5000);
  fs::path other_template = copy("other_template"), empty_template = copy("empty_template");
  fs::resize_file(empty_template / "chat_template.jinja", 0);
  write(other_template / "chat_template.jinja", "{{ messages }}");
  fs::path empty = folder / "empty";
  fs::create_directories(empty);
  struct {
    fs::path model;
    std::string part;
  } cases[] = {{"/nowhere/model", "/nowhere/model"},
               {empty, "empty"},
               {truncated, "model.safetensors"},
               {bad_config, "vocab_size"},
               {no_tokenizer, "tokenizer"},
               {empty_tokenizer, "tokenizer.json: is empty"},
               {cut_tokenizer, "cut_tokenizer/tokenizer.json: not valid JSON"},
               {empty_template, "chat_template.jinja: is empty"},
               {other_template, "--chat-format"}};
  for (const auto& c : cases) {
    Finished finished = RunToEnd({"serve", "--model", c.model, "--listen", "127.0.0.1:0", "--log-level", "off"});
    EXPECT_EQ(finished.code, 65) << c.model << ": " << finished.err;
    EXPECT_EQ(finished.out, "") << c.model;
    EXPECT_THAT(finished.err, ::testing::StartsWith("altiplano serve: ")) << c.model;
    EXPECT_THAT(finished.err, HasSubstr(c.part)) << c.model;
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
  }
  Finished inspected = RunToEnd({"inspect", cut_tokenizer});
  EXPECT_EQ(inspected.code, 65);
  EXPECT_THAT(inspected.out, HasSubstr("LlamaForCausalLM")) << "what can be known is shown";
  EXPECT_THAT(inspected.err, HasSubstr("cut_tokenizer/tokenizer.json: not valid JSON"));
  EXPECT_EQ(RunToEnd({"inspect", no_tokenizer}).code, 0) << "weights alone";
  fs::remove_all(folder);
}

// What collects a log's lines parses all of them, the last word too.
TEST(BadStart, TheLastWordIsALineOfTheLog) {
  Server first;
  ASSERT_FALSE(first.address().empty()) << first.process().Errors();
  struct {
    std::vector<std::string> flags;
    int code;
    std::string part;
  } cases[] = {{{"--model", "/nowhere/model", "--listen", "127.0.0.1:0"}, 65, "/nowhere/model"},
               {{"--model", kTiny, "--listen", first.address()}, 69, "--listen: cannot listen on " + first.address()}};
  for (auto& c : cases) {
    c.flags.insert(c.flags.begin(), "serve");
    const Finished json = RunToEnd(c.flags);  // stderr is no terminal
    EXPECT_EQ(json.code, c.code) << json.err;
    Json last;
    std::istringstream lines(json.err);
    for (std::string line; std::getline(lines, line);) {
      auto parsed = ParseJson(line);
      ASSERT_TRUE(parsed.ok()) << line;
      EXPECT_NE((*parsed)["event"], "grpc") << "what the last word says";
      last = *parsed;
    }
    EXPECT_EQ(last["level"], "error");
    EXPECT_EQ(last["event"], "serve failed");
    EXPECT_EQ(last["exit_code"], c.code);
    EXPECT_THAT(last["error"].get<std::string>(), HasSubstr(c.part));
    c.flags.insert(c.flags.end(), {"--log-format", "text"});
    EXPECT_THAT(RunToEnd(c.flags).err, HasSubstr(" error serve failed  error=\""));
  }
}

TEST(BadStart, SettingsThatDoNotSuitTheModelAre64) {
  struct {
    std::vector<std::string> flags;
    std::string part;
  } cases[] = {{{"--tensor-parallel", "3"}, "cannot be split into 3 ranks"},
               {{"--pipeline-parallel", "5"}, "cannot be split into 5 stages"},
               {{"--max-model-len", "200000"}, "--max-model-len is 200000"}};
  for (const auto& c : cases) {
    std::vector<std::string> arguments = {"serve", "--model", kTiny, "--listen", "127.0.0.1:0", "--log-level", "off"};
    arguments.insert(arguments.end(), c.flags.begin(), c.flags.end());
    Finished finished = RunToEnd(arguments);
    EXPECT_EQ(finished.code, 64) << finished.err;
    EXPECT_THAT(finished.err, HasSubstr(c.part));
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
  }
}

TEST(BadStart, NoDeviceNoMemoryNoAddressAre69) {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);  // whatever the machine has
  Server first;
  ASSERT_FALSE(first.address().empty()) << first.process().Errors();
  std::vector<std::string> base = {"serve", "--model", kTiny, "--log-level", "off"};
  struct {
    std::vector<std::string> flags;
    std::string part;
  } cases[] = {{{"--listen", "127.0.0.1:0", "--device", "cuda"}, "cuda"},
               {{"--listen", "127.0.0.1:0", "--kv-memory", "1000TiB"}, "--kv-memory is too large: "},
               {{"--listen", first.address()}, first.address()}};
  for (const auto& c : cases) {
    std::vector<std::string> arguments = base;
    arguments.insert(arguments.end(), c.flags.begin(), c.flags.end());
    Finished finished = RunToEnd(arguments);
    EXPECT_EQ(finished.code, 69) << finished.err;
    EXPECT_THAT(finished.err, HasSubstr(c.part));
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
  }
}

}  // namespace
}  // namespace altiplano::e2e

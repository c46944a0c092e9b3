// StreamCall and UnaryCall without gRPC and without an engine: events in, messages out, time as we say.
#include "server/frontend/stream_call.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/base/json.h"
#include "server/base/log.h"
#include "server/frontend/unary_call.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

namespace v1 = inference::v1;
using std::chrono::milliseconds;
using std::chrono::seconds;

struct Wire {
  std::vector<v1::StreamGenerateResponse> messages;
  std::optional<Status> finish;
  bool cancelled = false;
};

class FakeTransport : public StreamTransport {
 public:
  explicit FakeTransport(Wire* wire) : wire_(wire) {}
  void Write(const v1::StreamGenerateResponse& message) override { wire_->messages.push_back(message); }
  void WriteAndFinish(const v1::StreamGenerateResponse& message) override {
    wire_->messages.push_back(message);
    Finish(OkStatus());
  }
  void Finish(const Status& status) override {
    EXPECT_FALSE(wire_->finish.has_value()) << "finished twice";
    wire_->finish = status;
  }
  void Cancel() override { wire_->cancelled = true; }

 private:
  Wire* const wire_;
};

class StreamCallTest : public ::testing::Test {
 protected:
  StreamCallTest() : state_(ServerOptions()) {
    state_.Attach(std::make_shared<Backend>());
    EXPECT_TRUE(state_.Enter().ok());
    prepared_.request = request_;
    request_->prompt = {kBos, 1, 2};
    call_ = std::make_unique<StreamCall>(1, &state_, nullptr, std::make_unique<FakeTransport>(&wire_));
  }
  ~StreamCallTest() override {
    EXPECT_TRUE(wire_.finish.has_value());
    EXPECT_EQ(state_.live_requests(), 0);
  }

  void Tell(Notice notice) {
    call_->OnNotice(std::move(notice), now_);
    call_->Flush(now_);
  }
  void Prepare() { Tell(Prepared{"id", prepared_, TinyTokenizer()}); }
  void Admit() {
    Event event;
    event.kind = Event::Kind::kAdmitted;
    event.cached_tokens = 2;
    Tell(event);
  }
  void Token(char c, uint32_t sequence = 0, FinishReason finish = FinishReason::kNone) {
    Event event;
    event.kind = Event::Kind::kToken;
    event.sequence = sequence;
    event.finish = finish;
    event.score.token = ByteTokens(std::string(1, c))[0];
    Tell(event);
  }
  void Ended(Status status = OkStatus()) {
    Event event;
    event.kind = Event::Kind::kEnded;
    event.status = std::move(status);
    event.timing.total = milliseconds(5);
    Tell(event);
  }
  void Written() { Tell(WriteDone{true}); }
  void Elapse(Duration time) {
    now_ += time;
    if (call_->next_timer() <= now_) call_->Flush(now_);
  }
  std::string LastText() { return wire_.messages.back().deltas().items(0).text(); }

  TimePoint now_ = Clock::Real().Now();
  Wire wire_;
  FrontendState state_;
  std::shared_ptr<Request> request_ = std::make_shared<Request>();
  PreparedRequest prepared_;
  std::unique_ptr<StreamCall> call_;
};

TEST_F(StreamCallTest, OneWriteInFlightAndTheRestMerged) {
  Prepare();
  EXPECT_TRUE(wire_.messages.empty());
  Admit();
  ASSERT_EQ(wire_.messages.size(), 1U);
  EXPECT_EQ(wire_.messages[0].started().cached_tokens(), 2U);
  for (char c : std::string("abc")) Token(c);
  EXPECT_EQ(wire_.messages.size(), 1U);  // still writing
  Written();
  ASSERT_EQ(wire_.messages.size(), 2U);
  EXPECT_EQ(LastText(), "abc");
  Token('d', 0, FinishReason::kLength);
  Ended();
  EXPECT_EQ(wire_.messages.size(), 2U);
  Written();
  ASSERT_EQ(wire_.messages.size(), 3U);
  EXPECT_EQ(LastText(), "d");
  EXPECT_FALSE(wire_.finish);
  Written();
  ASSERT_TRUE(wire_.finish);
  EXPECT_TRUE(wire_.finish->ok());
  EXPECT_EQ(wire_.messages.back().completed().usage().completion_tokens(), 4U);
  for (size_t i = 0; i < wire_.messages.size(); ++i) EXPECT_EQ(wire_.messages[i].sequence_number(), i);
}

TEST_F(StreamCallTest, RefusalsSendNoMessage) {
  Tell(Prepared{"", Status(Code::kInvalidArgument, "no"), nullptr});
  EXPECT_TRUE(wire_.messages.empty());
  EXPECT_EQ(wire_.finish->code(), Code::kInvalidArgument);
}

TEST_F(StreamCallTest, EndBeforeAdmissionSendsNoMessageEither) {
  prepared_.echo = "prompt";
  Prepare();
  Ended(Status(Code::kDeadlineExceeded, "too late"));
  EXPECT_TRUE(wire_.messages.empty());
  EXPECT_EQ(wire_.finish->code(), Code::kDeadlineExceeded);
}

TEST_F(StreamCallTest, CancelDuringPreparationWaitsForIt) {
  Tell(ClientGone{});
  EXPECT_FALSE(wire_.finish);  // the text pool still reads the request
  Prepare();
  EXPECT_EQ(wire_.finish->code(), Code::kCancelled);
}

TEST_F(StreamCallTest, KilledDuringPreparation) {
  Tell(Killed{Status(Code::kAborted, "killed")});
  Prepare();
  EXPECT_EQ(wire_.finish->code(), Code::kAborted);
}

TEST_F(StreamCallTest, ErrorAfterTokensDeliversThemFirst) {
  Prepare();
  Admit();
  Token('a');
  Ended(Status(Code::kUnavailable, "down"));
  EXPECT_FALSE(wire_.finish);
  Written();
  EXPECT_EQ(LastText(), "a");
  Written();
  EXPECT_EQ(wire_.finish->code(), Code::kUnavailable);
}

TEST_F(StreamCallTest, AWholeAnswerIsOkWhateverCameAfter) {
  Prepare();
  Admit();
  Written();
  Token('a', 0, FinishReason::kEos);
  Ended(Status(Code::kDeadlineExceeded, "a moment later"));
  Written();
  EXPECT_TRUE(wire_.finish->ok());
}

TEST_F(StreamCallTest, CancelFinishesThoughAWriteIsInFlight) {
  Prepare();
  Admit();
  Tell(ClientGone{});
  EXPECT_EQ(wire_.finish->code(), Code::kCancelled);
  Token('a');  // late events are nothing
  Ended();
  EXPECT_EQ(wire_.messages.size(), 1U);
}

TEST_F(StreamCallTest, TheLogKnowsTheFirstTokenOfACallThatIsCutOff) {
  log::Init(log::Level::kInfo, log::Format::kJson);
  Prepare();
  Admit();
  Written();
  Elapse(seconds(100));
  Token('a');
  Elapse(seconds(1));
  Token('b');
  ::testing::internal::CaptureStderr();
  Tell(ClientGone{});
  log::Flush();
  auto line = ParseJson(::testing::internal::GetCapturedStderr());
  log::Init(log::Level::kInfo, log::Format::kAuto);
  ASSERT_TRUE(line.ok());
  EXPECT_EQ((*line)["completion_tokens"], 2);
  EXPECT_GT((*line)["ttft_ms"], 99e3) << "the engine's times come with its last event, which is not waited for";
  EXPECT_LE((*line)["ttft_ms"], 100e3);
}

TEST_F(StreamCallTest, UnreadBytesHaveABound) {
  prepared_.token_ids = true;
  Prepare();
  Admit();
  for (int64_t i = 0; !wire_.finish && i < state_.options.limits.max_unread_bytes; ++i) Token('a');
  ASSERT_TRUE(wire_.finish);
  EXPECT_EQ(wire_.finish->reason(), "SLOW_READER");
  EXPECT_EQ(wire_.finish->code(), Code::kResourceExhausted);
  EXPECT_FALSE(wire_.cancelled);
  Elapse(state_.options.limits.max_unread_time);
  EXPECT_TRUE(wire_.cancelled);
}

TEST_F(StreamCallTest, UnreadTimeHasABoundEvenAfterTheAnswersEnd) {
  Prepare();
  Admit();
  Token('a', 0, FinishReason::kEos);
  Ended();
  EXPECT_EQ(call_->next_timer(), now_ + state_.options.limits.max_unread_time);
  Elapse(state_.options.limits.max_unread_time - milliseconds(1));
  EXPECT_FALSE(wire_.finish);
  Elapse(milliseconds(1));
  ASSERT_TRUE(wire_.finish);
  EXPECT_EQ(wire_.finish->reason(), "SLOW_READER");
}

TEST_F(StreamCallTest, FlushIntervalHoldsBackUntilItsTime) {
  prepared_.min_flush_interval = seconds(2);
  Prepare();
  Admit();
  Written();
  Token('a');
  ASSERT_EQ(wire_.messages.size(), 2U);  // the first at once
  Written();
  Token('b');
  Token('c');
  EXPECT_EQ(wire_.messages.size(), 2U);
  EXPECT_EQ(call_->next_timer(), now_ + seconds(2));
  Elapse(seconds(2));
  ASSERT_EQ(wire_.messages.size(), 3U);
  EXPECT_EQ(LastText(), "bc");
  Written();
  Token('d', 0, FinishReason::kEos);
  Ended();  // the end does not wait
  EXPECT_EQ(LastText(), "d");
  Written();
  EXPECT_TRUE(wire_.finish->ok());
}

TEST_F(StreamCallTest, TimeLimitCountsFromAdmission) {
  prepared_.time_limit = seconds(10);
  request_->num_sequences = 2;
  Prepare();
  Elapse(seconds(1000));
  Admit();
  Written();
  Token('a', 0, FinishReason::kEos);
  Token('b', 1);
  Written();
  Written();
  Elapse(seconds(10) - milliseconds(1));
  EXPECT_EQ(wire_.messages.size(), 3U);
  Elapse(milliseconds(1));
  ASSERT_EQ(wire_.messages.size(), 4U);
  ASSERT_EQ(wire_.messages.back().deltas().items_size(), 1);
  EXPECT_EQ(wire_.messages.back().deltas().items(0).index(), 1U);
  EXPECT_EQ(wire_.messages.back().deltas().items(0).finish().reason(), v1::FINISH_REASON_TIME_LIMIT);
  Token('c', 1);  // made before the engine heard of it
  Written();
  Ended();
  EXPECT_EQ(wire_.messages.back().completed().usage().completion_tokens(), 2U);
}

TEST_F(StreamCallTest, PromptScoresComeInSeveralMessagesBeforeTheDeltas) {
  request_->sampling.prompt_top_logprobs = 20;
  request_->prompt.assign(3001, 5);
  Prepare();
  Admit();
  Event scores;
  scores.kind = Event::Kind::kPromptScores;
  scores.prompt_scores.resize(3000);
  for (TokenScore& score : scores.prompt_scores) score.top.resize(20);
  Tell(scores);
  Token('a', 0, FinishReason::kEos);
  Ended();
  while (!wire_.finish) Written();
  int total = 0;
  bool deltas = false;
  for (const auto& message : wire_.messages) {
    EXPECT_LT(message.ByteSizeLong(), 1U << 20);
    if (message.has_deltas()) deltas = true;
    if (!message.has_started()) continue;
    EXPECT_FALSE(deltas);
    EXPECT_EQ(message.started().request_id(), "id");
    total += message.started().logprobs_size();
  }
  EXPECT_EQ(total, 3000);
  EXPECT_GT(wire_.messages.size(), 5U);
}

TEST_F(StreamCallTest, InternalErrorsCarryAnId) {
  Prepare();
  ErrorDetail detail;
  detail.reason = "NON_FINITE_LOGITS";
  Ended(Status(Code::kInternal, "logits", detail));
  ASSERT_TRUE(wire_.finish);
  EXPECT_EQ(wire_.finish->reason(), "ENGINE_FAULT");
  EXPECT_EQ(wire_.finish->detail()->metadata.at("cause"), "NON_FINITE_LOGITS");
  EXPECT_EQ(wire_.finish->detail()->metadata.at("error_id"), "1");
}

TEST(EgressTest, NoticesOfUnknownCallsAreDropped) {
  Egress egress;
  Event event;
  event.kind = Event::Kind::kToken;
  egress.queue()->PostEvent(42, event);
  egress.queue()->Post(42, ClientGone{});
  egress.queue()->PostToAll(Status(Code::kUnavailable, "bye"));
  std::shared_ptr<EgressQueue> queue = egress.queue();
}

TEST(WorkPoolTest, BoundsJobsAndBytesAndRunsWhatItTook) {
  std::atomic<int> ran{0};
  {
    WorkPool pool(1, 2, 100);
    std::mutex gate;
    gate.lock();
    EXPECT_TRUE(pool.Run([&] {
      std::lock_guard lock(gate);
      ++ran;
    }));
    Eventually([&] { return pool.jobs() == 1; });
    // The first may still wait in the queue: until it runs, only one more fits.
    Eventually([&] { return pool.Run([&] { ++ran; }, 1000); });  // one job alone may be large
    Eventually([&] { return !pool.Run([&] { ++ran; }, 1); });
    gate.unlock();
  }
  EXPECT_GE(ran, 2);
}

}  // namespace
}  // namespace altiplano::testing

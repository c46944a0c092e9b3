// The client against a server that does what each test tells it.
#include "server/cli/client.h"

#include <gmock/gmock.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "altiplano/inference/v1/inference.grpc.pb.h"
#include "server/base/strings.h"

namespace altiplano::cli {
namespace {

using ::testing::HasSubstr;
using Writer = grpc::ServerWriter<v1::StreamGenerateResponse>;

class FakeInference : public v1::InferenceService::Service {
 public:
  std::function<grpc::Status(grpc::ServerContext*, const v1::GenerateRequest&, Writer*)> stream;

  grpc::Status StreamGenerate(grpc::ServerContext* context, const v1::StreamGenerateRequest* request,
                              Writer* writer) override {
    return stream(context, request->request(), writer);
  }
};

class ClientTest : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    auto client = Client::Connect(StrCat("grpc://127.0.0.1:", port, "/"), std::chrono::seconds(30));
    ASSERT_TRUE(client.ok()) << client.status().ToString();
    client_ = std::move(*client);
  }
  void TearDown() override { server_->Shutdown(std::chrono::system_clock::now()); }

  static v1::StreamGenerateResponse Delta(uint64_t number, const std::string& text, uint32_t tokens) {
    v1::StreamGenerateResponse response;
    response.set_sequence_number(number);
    auto* item = response.mutable_deltas()->add_items();
    item->set_text(text);
    item->set_num_tokens(tokens);
    return response;
  }

  FakeInference service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(ClientTest, StreamGathersAnAnswer) {
  service_.stream = [](grpc::ServerContext*, const v1::GenerateRequest& request, Writer* writer) {
    v1::StreamGenerateResponse started;
    started.mutable_started()->set_request_id(request.request_id());
    writer->Write(started);
    writer->Write(Delta(1, "Hel", 1));
    v1::StreamGenerateResponse last = Delta(2, "lo", 3);
    last.mutable_deltas()->mutable_items(0)->mutable_finish()->set_reason(v1::FINISH_REASON_LENGTH);
    writer->Write(last);
    v1::StreamGenerateResponse completed;
    completed.set_sequence_number(3);
    completed.mutable_completed()->mutable_usage()->set_completion_tokens(4);
    writer->Write(completed);
    return grpc::Status::OK;
  };
  v1::GenerateRequest request;
  request.set_request_id("r1");
  std::string text;
  Answer answer;
  Status status = client_->StreamGenerate(
      request, [&](const v1::Delta& delta) { text += delta.text(); }, &answer);
  ASSERT_TRUE(status.ok()) << status.ToString();
  EXPECT_EQ(text, "Hello");
  EXPECT_EQ(answer.prompt.request_id(), "r1");
  EXPECT_EQ(answer.tokens, 4u);
  EXPECT_EQ(answer.intervals.size(), 1u);
  ASSERT_EQ(answer.finishes.size(), 1u);
  EXPECT_EQ(answer.finishes[0].reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(answer.usage.completion_tokens(), 4u);
  EXPECT_GT(answer.first_token.count(), 0);
  EXPECT_GE(answer.total, answer.first_token);
  EXPECT_GT(answer.TokensPerSecond(), 0);
}

TEST(AnswerTest, TheRateIsOfTheServersTimesWhenItHasSaidThem) {
  Answer answer;
  answer.tokens = answer.first_tokens = 21;  // all in one message: nothing to measure here
  EXPECT_EQ(answer.TokensPerSecond(), 0);
  answer.finishes.resize(1);
  answer.usage.set_completion_tokens(21);
  answer.timing.mutable_first_token()->set_seconds(3);
  answer.timing.mutable_total()->set_seconds(5);
  EXPECT_EQ(answer.TokensPerSecond(), 10);
}

TEST_F(ClientTest, ManyStreamsRunAtOnceWithoutAThreadEach) {
  constexpr size_t kStreams = 8;
  std::atomic<size_t> arrived = 0;
  service_.stream = [&](grpc::ServerContext*, const v1::GenerateRequest& request, Writer* writer) {
    ++arrived;
    while (arrived < kStreams) std::this_thread::yield();  // ends only if all are under way together
    writer->Write(Delta(0, request.request_id(), 1));
    writer->Write(Delta(1, "!", 2));
    return request.request_id() == "3" ? grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full") : grpc::Status::OK;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::string> texts(kStreams);
  std::vector<Status> ends(kStreams);
  std::vector<uint64_t> tokens(kStreams);
  size_t ended = 0;
  for (size_t i = 0; i < kStreams; ++i) {
    v1::GenerateRequest request;
    request.set_request_id(StrCat(i));
    client_->StartGenerate(
        request, [&texts, i](const v1::Delta& delta) { texts[i] += delta.text(); },
        [&, i](const Status& status, Answer answer) {
          std::lock_guard lock(mutex);
          ends[i] = status;
          tokens[i] = answer.tokens;
          ++ended;
          changed.notify_all();
        });
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return ended == kStreams; });
  client_.reset();  // allowed from now on
  for (size_t i = 0; i < kStreams; ++i) {
    EXPECT_EQ(texts[i], StrCat(i, "!"));
    EXPECT_EQ(tokens[i], 3u);
    EXPECT_EQ(ends[i].code(), i == 3 ? Code::kResourceExhausted : Code::kOk);
  }
}

TEST_F(ClientTest, AGapInTheNumbersIsDataLoss) {
  service_.stream = [](grpc::ServerContext*, const v1::GenerateRequest&, Writer* writer) {
    writer->Write(Delta(0, "a", 1));
    writer->Write(Delta(2, "c", 1));
    return grpc::Status::OK;
  };
  Answer answer;
  EXPECT_EQ(client_
                ->StreamGenerate(
                    {}, [](const v1::Delta&) {}, &answer)
                .code(),
            Code::kDataLoss);
}

TEST_F(ClientTest, ErrorDetailsReachTheReader) {
  service_.stream = [](grpc::ServerContext*, const v1::GenerateRequest&, Writer*) {
    google::rpc::Status rich;
    google::rpc::ErrorInfo info;
    info.set_reason("CONTEXT_LENGTH_EXCEEDED");
    (*info.mutable_metadata())["limit"] = "8192";
    rich.add_details()->PackFrom(info);
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field("sampling.top_p");
    violation->set_description("is 1.5, must be in (0, 1]");
    rich.add_details()->PackFrom(bad);
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_nanos(250000000);
    rich.add_details()->PackFrom(retry);
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no", rich.SerializeAsString());
  };
  Answer answer;
  Status status = client_->StreamGenerate(
      {}, [](const v1::Delta&) {}, &answer);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_EQ(status.reason(), "CONTEXT_LENGTH_EXCEEDED");
  std::string text = DescribeError(status);
  for (const char* part : {"INVALID_ARGUMENT: no", "\n  sampling.top_p: is 1.5, must be in (0, 1]",
                           "\n  reason CONTEXT_LENGTH_EXCEEDED (limit 8192)", "\n  retry after 250 ms"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST_F(ClientTest, GarbageInsteadOfDetailsIsNoHarm) {
  service_.stream = [](grpc::ServerContext*, const v1::GenerateRequest&, Writer*) {
    return grpc::Status(grpc::StatusCode::INTERNAL, "x", "\xFF\xFF\xFFnot a message");
  };
  Answer answer;
  Status status = client_->StreamGenerate(
      {}, [](const v1::Delta&) {}, &answer);
  EXPECT_EQ(DescribeError(status), "INTERNAL: x");
}

TEST_F(ClientTest, CancelFromAnotherThreadEndsTheStream) {
  std::atomic<bool> saw_cancel = false;
  service_.stream = [&](grpc::ServerContext* context, const v1::GenerateRequest&, Writer* writer) {
    uint64_t number = 0;
    while (!context->IsCancelled()) {
      writer->Write(Delta(number++, "x", 1));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    saw_cancel = true;
    return grpc::Status::CANCELLED;
  };
  Cancellation cancellation;
  Answer answer;
  int deltas = 0;
  std::thread canceller;
  Status status = client_->StreamGenerate(
      {},
      [&](const v1::Delta&) {
        if (++deltas == 3) canceller = std::thread([&] { cancellation.Cancel(); });
      },
      &answer, &cancellation);
  canceller.join();
  EXPECT_EQ(status.code(), Code::kCancelled);
  EXPECT_TRUE(cancellation.cancelled());
  // Cancelled before it begins: ends at once too, until reset.
  EXPECT_EQ(client_
                ->StreamGenerate(
                    {}, [](const v1::Delta&) {}, &answer, &cancellation)
                .code(),
            Code::kCancelled);
  server_->Shutdown();
  EXPECT_TRUE(saw_cancel);
}

TEST_F(ClientTest, ACancellationEndsManyStreamsAndThoseThatComeLater) {
  constexpr size_t kStreams = 3;
  std::atomic<size_t> arrived = 0;
  service_.stream = [&](grpc::ServerContext* context, const v1::GenerateRequest&, Writer*) {
    ++arrived;
    while (!context->IsCancelled()) std::this_thread::yield();
    return grpc::Status::CANCELLED;
  };
  Cancellation cancellation;
  std::mutex mutex;
  std::condition_variable changed;
  size_t cancelled = 0;
  auto start = [&] {
    client_->StartGenerate(
        {}, [](const v1::Delta&) {},
        [&](const Status& status, const Answer&) {
          std::lock_guard lock(mutex);
          cancelled += status.code() == Code::kCancelled;
          changed.notify_all();
        },
        &cancellation);
  };
  for (size_t i = 0; i < kStreams; ++i) start();
  while (arrived < kStreams) std::this_thread::yield();
  cancellation.Cancel();
  start();
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return cancelled == kStreams + 1; });
}

TEST_F(ClientTest, NobodyThereIsUnavailable) {
  auto client = Client::Connect("127.0.0.1:1", std::chrono::milliseconds(50));
  ASSERT_FALSE(client.ok());
  EXPECT_EQ(client.status().code(), Code::kUnavailable);
  EXPECT_THAT(client.status().message(), HasSubstr("127.0.0.1:1"));
}

}  // namespace
}  // namespace altiplano::cli

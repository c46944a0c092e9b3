// The error table, row by row, over a real channel: code, reason, details, trailers.
#include <gmock/gmock.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <gtest/gtest.h>

#include <sstream>

#include "server/base/json.h"
#include "server/base/log.h"
#include "server/base/strings.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

namespace v1 = inference::v1;

grpc::Status Generate(TestServer& server, const v1::GenerateRequest& request, grpc::ClientContext* context = nullptr) {
  grpc::ClientContext own;
  v1::GenerateResponse response;
  return server.stub().Generate(context != nullptr ? context : &own, request, &response);
}

// Both rpcs refuse alike.
grpc::Status Refused(TestServer& server, const v1::GenerateRequest& request) {
  grpc::Status unary = Generate(server, request);
  StreamResult stream = Stream(server.stub(), request);
  EXPECT_EQ(unary.error_code(), stream.status.error_code());
  EXPECT_EQ(ReasonOf(unary), ReasonOf(stream.status));
  EXPECT_TRUE(stream.messages.empty());
  return stream.status;
}

std::string MetadataOf(const grpc::Status& status, const std::string& key) {
  auto info = DetailOf<google::rpc::ErrorInfo>(status);
  return info && info->metadata().contains(key) ? info->metadata().at(key) : "";
}

bool HasPushback(const grpc::ClientContext& context) {
  return context.GetServerTrailingMetadata().count("grpc-retry-pushback-ms") == 1;
}

// A call that the engine works on until it is told to end.
class LiveStream {
 public:
  LiveStream(TestServer& server, v1::GenerateRequest request) : stub_(v1::InferenceService::NewStub(server.Channel())) {
    v1::StreamGenerateRequest wrapped;
    *wrapped.mutable_request() = std::move(request);
    reader_ = stub_->StreamGenerate(&context_, wrapped);
  }
  bool Read() {
    v1::StreamGenerateResponse message;
    return reader_->Read(&message);
  }
  grpc::Status End() {
    while (Read()) {
    }
    return reader_->Finish();
  }
  grpc::ClientContext& context() { return context_; }

 private:
  std::unique_ptr<v1::InferenceService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::StreamGenerateResponse>> reader_;
};

v1::GenerateRequest Endless(const std::string& id = "") {
  v1::GenerateRequest request = TextRequest("go");
  request.set_request_id(id);
  return request;
}

TEST(ErrorTest, BadFieldsAreNamedAllAtOnce) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("hi");
  request.mutable_sampling()->set_top_p(1.5F);
  request.mutable_stopping()->add_sequences("");
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ReasonOf(status), "INVALID_FIELD");
  auto bad = DetailOf<google::rpc::BadRequest>(status);
  ASSERT_TRUE(bad);
  ASSERT_EQ(bad->field_violations_size(), 2);
  EXPECT_EQ(bad->field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(bad->field_violations(0).description(), "is 1.5, must be in (0, 1]");
  EXPECT_EQ(bad->field_violations(1).field(), "stopping.sequences[0]");
  EXPECT_EQ(status.error_message(), "sampling.top_p is 1.5, must be in (0, 1]; stopping.sequences[0] is empty");
}

// Operators find a client's complaint in the log by its id.
TEST(ErrorTest, WhatIsRefusedHasItsIdAndReasonInTheLogToo) {
  TestServer server;
  v1::GenerateRequest bad = TextRequest("x");
  bad.mutable_sampling()->set_top_p(2);
  v1::GenerateRequest named = bad, malformed = bad;
  named.set_request_id("mine");
  malformed.set_request_id("not\nmine");
  v1::GenerateRequest chat;
  chat.mutable_chat()->add_messages()->set_role(v1::ROLE_TOOL);
  log::Init(log::Level::kInfo, log::Format::kJson);
  ::testing::internal::CaptureStderr();
  for (const v1::GenerateRequest& request : {bad, named, malformed, chat}) {
    EXPECT_EQ(Generate(server, request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  log::Flush();
  std::istringstream lines(::testing::internal::GetCapturedStderr());
  log::Init(log::Level::kInfo, log::Format::kAuto);
  std::vector<std::string> ids;
  for (std::string line; std::getline(lines, line);) {
    auto json = ParseJson(line);
    ASSERT_TRUE(json.ok()) << line;
    if ((*json)["event"] != "request finished") continue;
    ids.push_back((*json)["request_id"]);
    EXPECT_EQ((*json)["reason"], "INVALID_FIELD") << "as the client gets it: " << line;
  }
  constexpr size_t kUuid = 36;
  ASSERT_EQ(ids.size(), 4U);
  EXPECT_EQ(ids[0].size(), kUuid);
  EXPECT_EQ(ids[1], "mine");
  EXPECT_EQ(ids[2].size(), kUuid);
}

TEST(ErrorTest, ChatFormatsViolationsAreBelowChat) {
  TestServer server;
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_role(v1::ROLE_TOOL);
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FirstField(status), "chat.messages[0].role");
}

TEST(ErrorTest, MessagesThatCannotBeParsedAreInvalidArguments) {
  TestServer server;
  v1::GenerateRequest good = TextRequest("hi");
  good.set_model("AAAA");  // a text in each of the messages
  std::string bytes = good.SerializeAsString();
  bytes[bytes.find("AAAA")] = '\xFF';  // not UTF-8 any more
  for (const std::string& body : {bytes, std::string("\x1A\xFF")}) {
    for (const char* method : {"Generate", "StreamGenerate", "Tokenize"}) {
      grpc::Slice slice(body);
      grpc::ByteBuffer request(&slice, 1), response;
      grpc::ClientContext context;
      std::string path = StrCat("/altiplano.inference.v1.InferenceService/", method);
      grpc::internal::RpcMethod rpc(path.c_str(), grpc::internal::RpcMethod::NORMAL_RPC);
      auto status = grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(server.channel().get(), rpc,
                                                                                          &context, request, &response);
      EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
    }
  }
  server.WaitForNoCalls();
}

// The libraries would write lines of their own between those of the log.
TEST(ErrorTest, WhatCannotBeParsedLeavesNoLineThatIsNotOurs) {
  TestServer server;
  log::Init(log::Level::kDebug, log::Format::kJson);
  ::testing::internal::CaptureStderr();
  grpc::Slice slice(std::string("\x1a\x02\xff\xfe"));  // field 3, text: no UTF-8
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::ClientContext context;
  grpc::internal::RpcMethod rpc("/altiplano.inference.v1.InferenceService/Generate",
                                grpc::internal::RpcMethod::NORMAL_RPC);
  auto status = grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(server.channel().get(), rpc,
                                                                                      &context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  log::Flush();
  const std::string log = ::testing::internal::GetCapturedStderr();
  log::Init(log::Level::kInfo, log::Format::kAuto);
  EXPECT_THAT(log, ::testing::HasSubstr("\"protobuf\""));
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) EXPECT_TRUE(ParseJson(line).ok()) << line;
}

TEST(ErrorTest, PromptLongerThanTheContext) {
  TestServer server;
  v1::GenerateRequest request;
  for (int i = 0; i < 4096; ++i) request.mutable_token_ids()->add_ids(5);
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(ReasonOf(status), "CONTEXT_LENGTH_EXCEEDED");
  EXPECT_EQ(MetadataOf(status, "limit"), "4096");
  EXPECT_EQ(MetadataOf(status, "actual"), "4097");
}

TEST(ErrorTest, UnknownModel) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("hi");
  request.set_model("large");
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(ReasonOf(status), "MODEL_NOT_FOUND");
  request.set_model("tiny");
  request.mutable_stopping()->set_max_new_tokens(1);
  EXPECT_TRUE(Generate(server, request).ok());
}

TEST(ErrorTest, DuplicateOfALiveIdAndReuseAfterItsEnd) {
  TestServer server;
  server.Hold();
  LiveStream first(server, Endless("same"));
  ASSERT_TRUE(first.Read());
  v1::GenerateRequest again = TextRequest("hi", 1);
  again.set_request_id("same");
  grpc::Status status = Refused(server, again);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(ReasonOf(status), "DUPLICATE_REQUEST_ID");
  server.Release();
  first.context().TryCancel();
  EXPECT_EQ(first.End().error_code(), grpc::StatusCode::CANCELLED);
  server.WaitForNoCalls();
  EXPECT_TRUE(Generate(server, again).ok());
  EXPECT_TRUE(Generate(server, again).ok());  // free the moment its answer is there
}

TEST(ErrorTest, FullQueueSaysWhenToComeBack) {
  TestServer::Options options;
  options.engine.max_queued_requests = 1;
  options.engine.scheduler.max_running = 1;
  TestServer server(options);
  server.Hold();
  LiveStream running(server, Endless());
  ASSERT_TRUE(running.Read());
  LiveStream waiting(server, Endless());
  Eventually([&] { return server.engine().load().scheduler.waiting_requests == 1; });
  grpc::ClientContext context;
  grpc::Status status = Generate(server, TextRequest("hi"), &context);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(status), "QUEUE_FULL");
  auto retry = DetailOf<google::rpc::RetryInfo>(status);
  ASSERT_TRUE(retry);
  EXPECT_GT(retry->retry_delay().seconds() * 1'000'000'000 + retry->retry_delay().nanos(), 0);
  EXPECT_TRUE(HasPushback(context));
  server.Release();
  running.context().TryCancel();
  waiting.context().TryCancel();
  running.End();
  waiting.End();
  server.WaitForNoCalls();
}

TEST(ErrorTest, LargerThanTheWholePool) {
  TestServer::Options options;
  options.engine.scheduler.num_blocks = 8;
  TestServer server(options);
  v1::GenerateRequest request;
  for (int i = 0; i < 300; ++i) request.mutable_token_ids()->add_ids(5);
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(ReasonOf(status), "REQUEST_TOO_LARGE_FOR_SERVER");
  // What fits at first is cut off by the pool's end, not refused.
  StreamResult cut = Stream(server.stub(), TextRequest("hi"));
  EXPECT_TRUE(cut.status.ok());
  EXPECT_EQ(cut.finish()->reason(), v1::FINISH_REASON_LENGTH);
}

TEST(ErrorTest, LoadingThenServing) {
  TestServer::Options options;
  options.attach = false;
  TestServer server(options);
  grpc::ClientContext context;
  grpc::Status status = Generate(server, TextRequest("hi"), &context);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonOf(status), "LOADING");
  EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(status));
  EXPECT_TRUE(HasPushback(context));
  EXPECT_EQ(Refused(server, TextRequest("hi")).error_code(), grpc::StatusCode::UNAVAILABLE);
  server.Attach();
  EXPECT_TRUE(Generate(server, TextRequest("hi", 1)).ok());
}

// A refusal does not commit the call: clients with a retry policy try again on their own.
TEST(ErrorTest, RefusalsAreTrailersOnlySoClientsRetry) {
  TestServer::Options options;
  options.attach = false;
  TestServer server(options);
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(R"({"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5,
      "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]}}]})");
  auto channel = grpc::CreateCustomChannel(server.server().address(), grpc::InsecureChannelCredentials(), arguments);
  auto stub = v1::InferenceService::NewStub(channel);
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    server.Attach();
  });
  StreamResult result = Stream(*stub, TextRequest("hi", 3));
  later.join();
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.text(), "abc");
}

TEST(ErrorTest, DrainingRefusesNewAndFinishesLive) {
  TestServer server;
  server.Hold();
  LiveStream live(server, TextRequest("go", 20));
  ASSERT_TRUE(live.Read());
  server.server().RefuseNew();
  grpc::Status status = Refused(server, TextRequest("hi"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonOf(status), "DRAINING");
  server.Release();
  EXPECT_TRUE(live.End().ok());
  EXPECT_TRUE(server.server().Resume().ok());
  EXPECT_TRUE(Generate(server, TextRequest("hi", 1)).ok());
}

TEST(ErrorTest, FailedStepIsEngineDown) {
  TestServer server;
  server.FailNextStep(Status(Code::kInternal, "the device is gone"));
  grpc::Status status = Stream(server.stub(), TextRequest("hi")).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonOf(status), "ENGINE_DOWN");
  EXPECT_EQ(ReasonOf(Refused(server, TextRequest("hi"))), "ENGINE_DOWN");
}

TEST(ErrorTest, LogitsThatAreNotNumbersAreAnEngineFault) {
  TestServer server;
  server.SetScript([](const Request& request, uint32_t, int32_t index) {
    return request.id == "bad" && index == 3 ? kNotANumber : Alphabet(request, 0, index);
  });
  v1::GenerateRequest request = TextRequest("hi", 10);
  request.set_request_id("bad");
  StreamResult result = Stream(server.stub(), request);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(ReasonOf(result.status), "ENGINE_FAULT");
  EXPECT_NE(MetadataOf(result.status, "error_id"), "");
  EXPECT_EQ(result.text(), "abc");  // what was good has been delivered
  request.set_request_id("good");
  EXPECT_EQ(Stream(server.stub(), request).text(), "abcdefghij");  // one request only
  server.WaitForNoCalls();
}

TEST(ErrorTest, ATenantsFullQueueIsNobodyElses) {
  TestServer::Options options;
  options.engine.scheduler.tenants = {{.name = "a", .max_running = 1, .max_queued_requests = 1}};
  TestServer server(options);
  server.SetStepTime(std::chrono::milliseconds(1));
  auto endless = Endless();
  endless.mutable_scheduling()->set_tenant("a");
  LiveStream running(server, endless);
  ASSERT_TRUE(running.Read());
  LiveStream waiting(server, endless);
  Eventually([&] { return server.engine().load().scheduler.tenants[0].waiting_requests == 1; });
  v1::GenerateRequest request = TextRequest("hi", 3);
  EXPECT_TRUE(Generate(server, request).ok());
  request.mutable_scheduling()->set_tenant("a");
  grpc::ClientContext context;
  grpc::Status status = Generate(server, request, &context);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(status), "TENANT_QUEUE_FULL");
  EXPECT_EQ(MetadataOf(status, "tenant"), "a");
  EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(status));
  EXPECT_TRUE(HasPushback(context));
  auto load_stub = v1::StatusService::NewStub(server.channel());
  grpc::ClientContext load_context;
  v1::Load load;
  ASSERT_TRUE(load_stub->GetLoad(&load_context, {}, &load).ok());
  EXPECT_EQ(load.tenants(0).refused_requests(), 1U);
  EXPECT_EQ(load.tenants(0).running_sequences(), 1U);
  EXPECT_EQ(load.tenants(0).waiting_requests(), 1U);
  EXPECT_GT(load.tenants(0).waiting_tokens(), 0U);
  running.context().TryCancel();
  waiting.context().TryCancel();
  running.End();
  waiting.End();
  server.WaitForNoCalls();
}

TEST(ErrorTest, WhatCannotMeetItsDeadlineIsRefusedAtOnce) {
  TestServer::Options options;
  options.engine.scheduler.step_cost.token_us = 1e9;
  TestServer server(options);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(10));
  grpc::Status status = Generate(server, TextRequest("hi"), &context);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(ReasonOf(status), "HOPELESS");
  EXPECT_GT(std::stod(MetadataOf(status, "prefill_ms")), std::stod(MetadataOf(status, "left_ms")));
  EXPECT_THAT(status.error_message(), ::testing::ContainsRegex("in [0-9.]{1,11} ms cannot be met"));
  server.WaitForNoCalls();
}

TEST(ErrorTest, QueueTimeout) {
  TestServer::Options options;
  options.engine.scheduler.max_running = 1;
  TestServer server(options);
  server.SetStepTime(std::chrono::milliseconds(1));
  LiveStream running(server, Endless());
  ASSERT_TRUE(running.Read());
  v1::GenerateRequest request = TextRequest("hi");
  request.mutable_scheduling()->mutable_queue_timeout()->set_nanos(20'000'000);
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(ReasonOf(status), "QUEUE_TIMEOUT");
  running.context().TryCancel();
  running.End();
  server.WaitForNoCalls();
}

TEST(ErrorTest, ClientDeadlineFreesTheBlocks) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));
  for (bool stream : {false, true}) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(60));
    v1::StreamGenerateRequest wrapped;
    *wrapped.mutable_request() = TextRequest("go");
    grpc::Status status =
        stream ? Stream(server.stub(), wrapped, &context).status : Generate(server, wrapped.request(), &context);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
    server.WaitForNoCalls();
  }
}

TEST(ErrorTest, ClientCancelFreesTheBlocksWhereverItComes) {
  TestServer server;
  server.SetStepTime(std::chrono::microseconds(200));
  for (int reads = 0; reads < 20; ++reads) {
    LiveStream stream(server, Endless());
    for (int i = 0; i < reads; ++i) ASSERT_TRUE(stream.Read());
    stream.context().TryCancel();
    EXPECT_EQ(stream.End().error_code(), grpc::StatusCode::CANCELLED);
  }
  server.WaitForNoCalls();
  EXPECT_EQ(server.engine().load().scheduler.running_requests, 0);
}

TEST(ErrorTest, UnaryCancelFreesTheBlocks) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));
  grpc::ClientContext context;
  std::thread caller(
      [&] { EXPECT_EQ(Generate(server, Endless(), &context).error_code(), grpc::StatusCode::CANCELLED); });
  Eventually([&] { return server.engine().load().scheduler.running_requests == 1; });
  context.TryCancel();
  caller.join();
  server.WaitForNoCalls();
}

TEST(ErrorTest, CancelRequestsAborts) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));
  LiveStream stream(server, Endless("victim"));
  ASSERT_TRUE(stream.Read());
  auto status_stub = v1::StatusService::NewStub(server.channel());
  v1::CancelRequestsRequest request;
  request.add_request_ids("unknown");
  request.add_request_ids("victim");
  request.set_reason("maintenance");
  grpc::ClientContext context;
  v1::CancelRequestsResponse response;
  ASSERT_TRUE(status_stub->CancelRequests(&context, request, &response).ok());
  EXPECT_THAT(response.cancelled_request_ids(), ::testing::ElementsAre("victim"));
  grpc::Status status = stream.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(ReasonOf(status), "CANCELLED_BY_ADMIN");
  EXPECT_EQ(MetadataOf(status, "reason"), "maintenance");
  server.WaitForNoCalls();
}

TEST(ErrorTest, WhatIsNotSupportedYet) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("hi");
  request.mutable_constraint()->set_regex("[a-z]+");
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(ReasonOf(status), "FEATURE");
  EXPECT_EQ(MetadataOf(status, "feature"), "constraint");
  v1::GenerateRequest forced;
  forced.mutable_chat()->add_messages()->set_role(v1::ROLE_USER);
  forced.mutable_chat()->mutable_tool_choice()->set_mode(v1::TOOL_MODE_REQUIRED);
  EXPECT_EQ(Refused(server, forced).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  forced.mutable_chat()->mutable_tool_choice()->set_function("f");
  EXPECT_EQ(Refused(server, forced).error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST(ErrorTest, ChatWithoutAChatFormat) {
  TestServer::Options options;
  options.model.chat_format = nullptr;
  TestServer server(options);
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_role(v1::ROLE_USER);
  grpc::Status status = Refused(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("--chat-format"));
}

TEST(ErrorTest, TooLargeAMessageIsNotParsed) {
  TestServer::Options options;
  options.server.limits.max_message_bytes = 10'000;
  TestServer server(options);
  EXPECT_EQ(Generate(server, TextRequest(std::string(20'000, 'x'))).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST(ErrorTest, DetailsOfAHugeErrorFitIntoHeaders) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("hi");
  request.set_model(std::string(100'000, 'm'));
  EXPECT_EQ(Generate(server, request).error_code(), grpc::StatusCode::NOT_FOUND);
  request.clear_model();
  for (int i = 0; i < 1000; ++i) request.mutable_stopping()->add_sequences(std::string(300, 's'));
  grpc::Status status = Generate(server, request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FirstField(status), "stopping.sequences");
}

// --- Readers that do not read ----------------------------------------------------------------------------------------

v1::GenerateRequest Loud() {
  v1::GenerateRequest request = TextRequest("go", 2000);
  request.mutable_sampling()->set_num_sequences(16);
  request.mutable_output()->set_top_logprobs(20);
  return request;
}

TEST(SlowReaderTest, TooMuchUnreadEndsTheCall) {
  TestServer server;
  // Faster, and a busy machine hands all of the answer to gRPC as one message, after which nothing is left unsent.
  server.SetStepTime(std::chrono::milliseconds(1));
  LiveStream stream(server, Loud());
  ASSERT_TRUE(stream.Read());
  Eventually([&] { return server.server().live_requests() == 0; });
  grpc::Status status = stream.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(status), "SLOW_READER");
  server.WaitForNoCalls();
}

TEST(SlowReaderTest, WhoNeverReadsIsResetAtLast) {
  TestServer::Options options;
  options.server.limits.max_unread_bytes = 1 << 30;
  options.server.limits.max_unread_time = std::chrono::milliseconds(300);
  TestServer server(options);
  LiveStream stream(server, Loud());
  ASSERT_TRUE(stream.Read());
  server.WaitForNoCalls();  // though nothing was read
  EXPECT_FALSE(stream.End().ok());
}

TEST(SlowReaderTest, OneDoesNotDisturbAnother) {
  TestServer server;
  LiveStream slow(server, Loud());
  ASSERT_TRUE(slow.Read());
  StreamResult other = Stream(server.stub(), TextRequest("hi", 200));
  EXPECT_TRUE(other.status.ok());
  EXPECT_EQ(other.num_tokens(), 200U);
  slow.context().TryCancel();
  slow.End();
}

// --- The end of the server -------------------------------------------------------------------------------------------

TEST(ShutdownTest, LiveCallsEndUnavailable) {
  auto server = std::make_unique<TestServer>();
  server->SetStepTime(std::chrono::milliseconds(1));
  LiveStream stream(*server, Endless());
  ASSERT_TRUE(stream.Read());
  grpc::Status unary;
  std::thread caller([&, stub = v1::InferenceService::NewStub(server->Channel())] {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    unary = stub->Generate(&context, Endless(), &response);
  });
  Eventually([&] { return server->server().live_requests() == 2; });
  server->server().Stop();
  EXPECT_EQ(stream.End().error_code(), grpc::StatusCode::UNAVAILABLE);
  caller.join();
  EXPECT_EQ(unary.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(ShutdownTest, DrainEndsWhatIsLeftAfterTheGrace) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));
  LiveStream stream(server, Endless());
  ASSERT_TRUE(stream.Read());
  server.server().Drain(std::chrono::milliseconds(20));
  EXPECT_EQ(server.server().live_requests(), 0);
  grpc::Status status = stream.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonOf(status), "DRAINING");
  server.WaitForNoCalls();
}

TEST(ShutdownTest, DrainReturnsWhenNoneIsLive) {
  TestServer server;
  server.Hold();
  LiveStream stream(server, TextRequest("go", 30));
  ASSERT_TRUE(stream.Read());
  std::thread drain([&] { server.server().Drain(std::chrono::hours(1)); });
  server.Release();
  EXPECT_TRUE(stream.End().ok());
  drain.join();
}

}  // namespace
}  // namespace altiplano::testing

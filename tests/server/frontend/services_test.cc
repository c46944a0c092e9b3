// The services beside generation: tokens, models, status, admin, health, reflection.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/dynamic_message.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <future>
#include <latch>
#include <set>

#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"
#include "server/base/json.h"
#include "server/base/log.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

namespace v1 = inference::v1;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ::testing::HasSubstr;

grpc::Status Tokenize(TestServer& server, const v1::TokenizeRequest& request, v1::TokenizeResponse* response) {
  grpc::ClientContext context;
  return server.stub().Tokenize(&context, request, response);
}

TEST(TokenizeTest, TextWithAndWithoutBos) {
  TestServer server;
  std::vector<TokenId> ids = Encode("The capital <|eot_id|>");
  v1::TokenizeRequest request;
  request.set_text("The capital <|eot_id|>");
  v1::TokenizeResponse response;
  ASSERT_TRUE(Tokenize(server, request, &response).ok());
  EXPECT_EQ(response.count(), ids.size() + 1);
  EXPECT_EQ(response.token_ids(0), static_cast<uint32_t>(kBos));
  request.set_omit_bos(true);
  ASSERT_TRUE(Tokenize(server, request, &response).ok());
  EXPECT_THAT(response.token_ids(), ::testing::ElementsAreArray(ids.begin(), ids.end()));
  EXPECT_THAT(response.token_ids(), ::testing::Each(::testing::Lt(static_cast<uint32_t>(kBos))));  // no specials

  v1::DetokenizeRequest back;
  for (uint32_t id : response.token_ids()) back.add_token_ids(id);
  back.add_token_ids(kEot);
  v1::DetokenizeResponse text;
  grpc::ClientContext plain;
  ASSERT_TRUE(server.stub().Detokenize(&plain, back, &text).ok());
  EXPECT_EQ(text.text(), "The capital <|eot_id|>");
  back.set_keep_special_tokens(true);
  grpc::ClientContext special;
  ASSERT_TRUE(server.stub().Detokenize(&special, back, &text).ok());
  EXPECT_EQ(text.text(), "The capital <|eot_id|><|eot_id|>");
}

TEST(TokenizeTest, ChatShowsWhatTheModelSees) {
  TestServer server;
  v1::TokenizeRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content("What is the capital of France?");
  v1::TokenizeResponse response;
  ASSERT_TRUE(Tokenize(server, request, &response).ok());
  auto goldens = ParseJson(ReadFile(ALTIPLANO_SOURCE_DIR "/tests/data/tiny/goldens.json"));
  ASSERT_TRUE(goldens.ok());
  const Json& golden = goldens->at(0);
  ASSERT_EQ(golden.at("id"), "capital-en");
  EXPECT_EQ(Json(std::vector<uint32_t>(response.token_ids().begin(), response.token_ids().end())),
            golden.at("prompt_token_ids"));
  EXPECT_EQ(response.rendered(), golden.at("rendered").get<std::string>());
}

TEST(TokenizeTest, Refusals) {
  TestServer server;
  v1::TokenizeResponse response;
  EXPECT_EQ(FirstField(Tokenize(server, {}, &response)), "input");
  v1::TokenizeRequest chat;
  chat.mutable_chat();
  EXPECT_EQ(FirstField(Tokenize(server, chat, &response)), "chat.messages");
  v1::TokenizeRequest model;
  model.set_model("other");
  model.set_text("x");
  EXPECT_EQ(Tokenize(server, model, &response).error_code(), grpc::StatusCode::NOT_FOUND);
  v1::DetokenizeRequest ids;
  ids.add_token_ids(2048);
  grpc::ClientContext context;
  v1::DetokenizeResponse text;
  EXPECT_EQ(FirstField(server.stub().Detokenize(&context, ids, &text)), "token_ids[0]");
}

TEST(ModelServiceTest, OneModel) {
  TestServer::Options options;
  options.model.features = {"from-the-program"};
  TestServer server(options);
  auto stub = v1::ModelService::NewStub(server.channel());
  grpc::ClientContext list;
  v1::ListModelsResponse models;
  ASSERT_TRUE(stub->ListModels(&list, {}, &models).ok());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.next_page_token(), "");
  const v1::Model& model = models.models(0);
  EXPECT_EQ(model.name(), "tiny");
  EXPECT_EQ(model.max_context(), 4096U);
  EXPECT_EQ(model.vocab_size(), 2048U);
  EXPECT_EQ(model.chat_format(), "llama3.1");
  EXPECT_THAT(model.eos_token_ids(), ::testing::ElementsAre(1793, 1800, 1801));
  EXPECT_THAT(model.features(), ::testing::IsSupersetOf({"chat", "tools", "logprobs", "from-the-program"}));
  EXPECT_THAT(model.features(), ::testing::Not(::testing::Contains("prefix_cache"))) << "the program knows whether";
  v1::GetModelRequest get;
  get.set_name("tiny");
  grpc::ClientContext context;
  v1::Model same;
  ASSERT_TRUE(stub->GetModel(&context, get, &same).ok());
  EXPECT_EQ(same.SerializeAsString(), model.SerializeAsString());
  get.set_name("other");
  grpc::ClientContext other;
  EXPECT_EQ(stub->GetModel(&other, get, &same).error_code(), grpc::StatusCode::NOT_FOUND);
  v1::ListModelsRequest page;
  page.set_page_token("2");
  grpc::ClientContext paged;
  EXPECT_EQ(FirstField(stub->ListModels(&paged, page, &models)), "page_token");
}

TEST(StatusServiceTest, InfoAndLoad) {
  TestServer::Options options;
  options.engine.scheduler.step_cost.token_us = 25;
  options.engine.scheduler.tenants = {{.name = "gold", .weight = 3}};
  options.model.devices = {{.device = "GPU 3: a test",
                            .replica = 1,
                            .ranks = {4, 5},
                            .weight_bytes = 10,
                            .activation_bytes = 11,
                            .kv_cache_bytes = 12,
                            .free_bytes = 13,
                            .total_bytes = 99}};
  TestServer server(options);
  auto stub = v1::StatusService::NewStub(server.channel());
  grpc::ClientContext info_context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(stub->GetServerInfo(&info_context, {}, &info).ok());
  EXPECT_EQ(info.version(), "1.2.3");
  EXPECT_EQ(info.commit(), "abc");
  EXPECT_EQ(info.device(), "a test");
  ASSERT_EQ(info.devices_size(), 1);
  EXPECT_EQ(info.devices(0).ShortDebugString(),
            "device: \"GPU 3: a test\" replica: 1 ranks: 4 ranks: 5 weight_bytes: 10 activation_bytes: 11 "
            "kv_cache_bytes: 12 free_bytes: 13 total_bytes: 99");
  v1::GenerateRequest request = TextRequest("hi", 3);
  request.mutable_scheduling()->set_tenant("gold");
  request.mutable_scheduling()->mutable_ttft_target()->set_seconds(60);
  ASSERT_TRUE(Stream(server.stub(), request).status.ok());
  server.WaitForNoCalls();
  grpc::ClientContext load_context;
  v1::Load load;
  ASSERT_TRUE(stub->GetLoad(&load_context, {}, &load).ok());
  EXPECT_EQ(load.running_requests(), 0U);
  EXPECT_EQ(load.kv_blocks_total(), 1024U);
  EXPECT_EQ(load.kv_blocks_used(), 0U);
  EXPECT_EQ(load.kv_block_tokens(), 16U);
  EXPECT_GE(load.steps(), 3U);
  ASSERT_EQ(load.replicas_size(), 1);
  EXPECT_TRUE(load.replicas(0).healthy());
  EXPECT_EQ(load.replicas(0).kv_blocks_total(), 1024U);
  EXPECT_EQ(load.step_cost().token_us(), 25);
  EXPECT_EQ(load.measured_steps(), 0U) << "the script measures nothing";
  EXPECT_EQ(load.step_cost_error(), 0);
  EXPECT_EQ(load.targets_met(), 1U);
  EXPECT_EQ(load.targets_missed(), 0U);
  EXPECT_EQ(load.hopeless_requests(), 0U);
  ASSERT_EQ(load.tenants_size(), 2);
  EXPECT_EQ(load.tenants(0).name(), "gold");
  EXPECT_EQ(load.tenants(0).weight(), 3U);
  EXPECT_GT(load.tenants(0).prompt_tokens(), 0U);
  EXPECT_EQ(load.tenants(0).generated_tokens(), 3U);
  EXPECT_EQ(load.tenants(0).running_sequences(), 0U);
  EXPECT_EQ(load.tenants(1).name(), "*");
  EXPECT_EQ(load.tenants(1).prompt_tokens(), 0U);
  EXPECT_FALSE(load.draining());
  server.server().RefuseNew();
  grpc::ClientContext again;
  ASSERT_TRUE(stub->GetLoad(&again, {}, &load).ok());
  EXPECT_TRUE(load.draining());
}

TEST(StatusServiceTest, WatchLoadKeepsTelling) {
  TestServer server;
  auto stub = v1::StatusService::NewStub(server.channel());
  v1::WatchLoadRequest request;
  request.mutable_interval()->set_nanos(100'000'000);
  grpc::ClientContext context;
  auto reader = stub->WatchLoad(&context, request);
  v1::Load load;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(reader->Read(&load));
  context.TryCancel();
  while (reader->Read(&load)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  server.WaitForNoCalls();
  request.mutable_interval()->set_nanos(1);
  grpc::ClientContext bad;
  reader = stub->WatchLoad(&bad, request);
  EXPECT_FALSE(reader->Read(&load));
  const grpc::Status refused = reader->Finish();
  EXPECT_EQ(FirstField(refused), "interval");
  EXPECT_THAT(refused.error_message(), HasSubstr("must be in [100 ms, ten years]"));
}

TEST(StatusServiceTest, LoadingServerHasInfoAndNoLoad) {
  TestServer::Options options;
  options.attach = false;
  TestServer server(options);
  auto stub = v1::StatusService::NewStub(server.channel());
  grpc::ClientContext info_context, load_context, watch_context, cancel_context, model_context;
  v1::GetServerInfoResponse info;
  EXPECT_TRUE(stub->GetServerInfo(&info_context, {}, &info).ok());
  v1::Load load;
  EXPECT_EQ(ReasonOf(stub->GetLoad(&load_context, {}, &load)), "LOADING");
  auto reader = stub->WatchLoad(&watch_context, {});
  EXPECT_FALSE(reader->Read(&load));
  EXPECT_EQ(ReasonOf(reader->Finish()), "LOADING");
  v1::CancelRequestsResponse cancelled;
  EXPECT_TRUE(stub->CancelRequests(&cancel_context, {}, &cancelled).ok());
  v1::ListModelsResponse models;
  EXPECT_EQ(ReasonOf(v1::ModelService::NewStub(server.channel())->ListModels(&model_context, {}, &models)), "LOADING");
}

TEST(AdminServiceTest, OnlyOnItsOwnListener) {
  TestServer server;
  grpc::ClientContext context;
  v1::ResumeResponse response;
  grpc::Status status = v1::AdminService::NewStub(server.channel())->Resume(&context, {}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  auto admin = server.Channel(/*admin=*/true);
  grpc::ClientContext admin_context, generate_context;
  EXPECT_TRUE(v1::AdminService::NewStub(admin)->Resume(&admin_context, {}, &response).ok());
  v1::GenerateResponse answer;
  status = v1::InferenceService::NewStub(admin)->Generate(&generate_context, TextRequest("hi"), &answer);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST(AdminServiceTest, DrainCountsRefusesAndResumes) {
  TestServer server;
  server.Hold();
  grpc::ClientContext live_context;
  v1::StreamGenerateRequest request;
  *request.mutable_request() = TextRequest("go", 5);
  auto live = server.stub().StreamGenerate(&live_context, request);
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(live->Read(&message));
  auto admin = v1::AdminService::NewStub(server.Channel(true));
  v1::DrainRequest drain;
  drain.mutable_grace()->set_seconds(3600);
  v1::DrainResponse drained;
  grpc::ClientContext drain_context, resume_context;
  ASSERT_TRUE(admin->Drain(&drain_context, drain, &drained).ok());
  EXPECT_EQ(drained.live_requests(), 1U);
  EXPECT_EQ(ReasonOf(Stream(server.stub(), TextRequest("hi")).status), "DRAINING");
  server.Release();
  while (live->Read(&message)) {
  }
  EXPECT_TRUE(live->Finish().ok());
  v1::ResumeResponse resumed;
  ASSERT_TRUE(admin->Resume(&resume_context, {}, &resumed).ok());
  EXPECT_TRUE(Stream(server.stub(), TextRequest("hi", 1)).status.ok());
}

TEST(AdminServiceTest, DrainEndsWhatIsLeftAfterTheGrace) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));
  grpc::ClientContext live_context;
  v1::StreamGenerateRequest request;
  *request.mutable_request() = TextRequest("go");
  auto live = server.stub().StreamGenerate(&live_context, request);
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(live->Read(&message));
  v1::DrainRequest drain;
  drain.mutable_grace();  // none at all
  v1::DrainResponse drained;
  grpc::ClientContext context;
  ASSERT_TRUE(v1::AdminService::NewStub(server.Channel(true))->Drain(&context, drain, &drained).ok());
  while (live->Read(&message)) {
  }
  const grpc::Status status = live->Finish();
  EXPECT_EQ(ReasonOf(status), "DRAINING");
  EXPECT_EQ(status.error_message(), "the server is draining and its grace for live calls is over");
}

TEST(AdminServiceTest, CacheLevelAndRecorder) {
  TestServer server;
  ASSERT_TRUE(Stream(server.stub(), TextRequest(std::string(200, 'x'), 3)).status.ok());
  server.WaitForNoCalls();
  ASSERT_GT(server.engine().load().scheduler.blocks_cached, 0);
  auto admin = v1::AdminService::NewStub(server.Channel(true));
  grpc::ClientContext reset_context, level_context, bad_context, dump_context;
  v1::ResetPrefixCacheResponse reset;
  ASSERT_TRUE(admin->ResetPrefixCache(&reset_context, {}, &reset).ok());
  EXPECT_GT(reset.freed_blocks(), 0U);
  v1::SetLogLevelRequest level;
  level.set_level("error");
  v1::SetLogLevelResponse done;
  ::testing::internal::CaptureStderr();
  ASSERT_TRUE(admin->SetLogLevel(&level_context, level, &done).ok());
  log::Flush();
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("log level set, as an operator asks"));
  EXPECT_FALSE(log::Enabled(log::Level::kInfo));
  level.set_level("loud");
  EXPECT_EQ(FirstField(admin->SetLogLevel(&bad_context, level, &done)), "level");
  EXPECT_TRUE(log::SetLevel("info").ok());
  auto dump = admin->DumpFlightRecord(&dump_context, {});
  v1::DumpFlightRecordResponse chunk;
  EXPECT_FALSE(dump->Read(&chunk));
  grpc::Status status = dump->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("--flight-record-memory is 0"));
}

TEST(AdminServiceTest, FlightRecordComesWholeAndKnowsRequestsByTheirIds) {
  TestServer::Options options;
  options.engine.flight_record_bytes = 4 << 20;
  TestServer server(options);
  v1::GenerateRequest request = TextRequest("some text", 3);
  for (int i = 0; i < 4000; ++i) {  // more than one chunk
    request.set_request_id(std::string(100, 'x') + std::to_string(i));
    ASSERT_TRUE(Stream(server.stub(), request).status.ok());
  }
  auto admin = v1::AdminService::NewStub(server.Channel(true));
  grpc::ClientContext context;
  auto dump = admin->DumpFlightRecord(&context, {});
  std::string file;
  v1::DumpFlightRecordResponse chunk;
  int chunks = 0;
  for (; dump->Read(&chunk); ++chunks) file += chunk.chunk();
  ASSERT_TRUE(dump->Finish().ok());
  EXPECT_GT(chunks, 1);
  v1::DumpFlightRecordRequest second;
  second.set_replica(1);
  grpc::ClientContext none_context;
  auto none = admin->DumpFlightRecord(&none_context, second);
  EXPECT_FALSE(none->Read(&chunk));
  const grpc::Status no_such = none->Finish();
  EXPECT_EQ(no_such.error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(no_such.error_message(), "there is no replica 1: this server has one, which is number 0");
  EXPECT_THAT(file, HasSubstr(std::string(100, 'x') + "3999"));
}

// --- Health ----------------------------------------------------------------------------------------------------------

HealthCheckResponse::ServingStatus Health(TestServer& server, const std::string& service = "") {
  HealthCheckRequest request;
  request.set_service(service);
  grpc::ClientContext context;
  HealthCheckResponse response;
  grpc::Status status = grpc::health::v1::Health::NewStub(server.channel())->Check(&context, request, &response);
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) return HealthCheckResponse::SERVICE_UNKNOWN;
  EXPECT_TRUE(status.ok());
  return response.status();
}

TEST(HealthTest, FollowsModelDrainAndOwner) {
  TestServer::Options options;
  options.attach = false;
  TestServer server(options);
  EXPECT_EQ(Health(server), HealthCheckResponse::NOT_SERVING);
  server.Attach();
  for (const char* service : {"", "altiplano.inference.v1.InferenceService", "altiplano.inference.v1.ModelService",
                              "altiplano.inference.v1.StatusService", "grpc.health.v1.Health"}) {
    EXPECT_EQ(Health(server, service), HealthCheckResponse::SERVING) << service;
  }
  EXPECT_EQ(Health(server, "nobody"), HealthCheckResponse::SERVICE_UNKNOWN);
  server.server().SetServing(false);
  EXPECT_EQ(Health(server), HealthCheckResponse::NOT_SERVING);
  EXPECT_TRUE(Stream(server.stub(), TextRequest("hi", 1)).status.ok());  // health only
  server.server().SetServing(true);
  server.server().RefuseNew();
  EXPECT_EQ(Health(server), HealthCheckResponse::NOT_SERVING);
  EXPECT_TRUE(server.server().Resume().ok());
  EXPECT_EQ(Health(server), HealthCheckResponse::SERVING);
}

TEST(AdminServiceTest, NothingResumesAServerThatIsAboutToEnd) {
  TestServer server;
  server.server().AnnounceEnd();
  EXPECT_EQ(Health(server), HealthCheckResponse::NOT_SERVING);
  EXPECT_TRUE(Stream(server.stub(), TextRequest("hi", 1)).status.ok()) << "still taken";
  server.server().RefuseNew();
  grpc::ClientContext context;
  v1::ResumeResponse response;
  grpc::Status status = v1::AdminService::NewStub(server.Channel(/*admin=*/true))->Resume(&context, {}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Health(server), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(ReasonOf(Stream(server.stub(), TextRequest("hi")).status), "DRAINING");
}

TEST(HealthTest, AStuckStepIsNotServingThoughEverythingLives) {
  TestServer::Options options;
  options.engine.health_deadline = std::chrono::milliseconds(50);
  TestServer server(options);
  EXPECT_EQ(Health(server), HealthCheckResponse::SERVING);
  server.Hold();
  grpc::ClientContext context;
  v1::StreamGenerateRequest request;
  *request.mutable_request() = TextRequest("go", 1);
  auto stream = server.stub().StreamGenerate(&context, request);
  Eventually([&] { return Health(server) == HealthCheckResponse::NOT_SERVING; });
  server.Release();
  v1::StreamGenerateResponse message;
  while (stream->Read(&message)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(Health(server), HealthCheckResponse::SERVING);
}

// How a watch of health ends whose client pings as often as gRPC lets it, while nothing else is sent.
grpc::StatusCode EndOfPingingWatch(Duration min_client_ping_interval, std::chrono::milliseconds patience) {
  TestServer::Options options;
  options.server.limits.min_client_ping_interval = min_client_ping_interval;
  TestServer server(options);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  auto channel = grpc::CreateCustomChannel(server.server().address(), grpc::InsecureChannelCredentials(), arguments);
  auto stub = grpc::health::v1::Health::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + patience);
  auto reader = stub->Watch(&context, {});
  HealthCheckResponse response;
  EXPECT_TRUE(reader->Read(&response));
  EXPECT_FALSE(reader->Read(&response));
  return reader->Finish().error_code();
}

TEST(ListenerTest, ClientsThatPingTooOftenAreCutOff) {
  EXPECT_EQ(EndOfPingingWatch(std::chrono::hours(1), std::chrono::seconds(60)), grpc::StatusCode::UNAVAILABLE);
}

// gRPC's client pings once a second at most, so that the third ping, which would end it, comes after three.
TEST(ListenerTest, ClientsMayPingAsOftenAsTheyAreAllowed) {
  auto any = std::async(std::launch::async, EndOfPingingWatch, Duration(0), std::chrono::milliseconds(4500));
  auto seldom_enough = EndOfPingingWatch(std::chrono::milliseconds(1), std::chrono::milliseconds(4500));
  EXPECT_EQ(seldom_enough, grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(any.get(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST(HealthTest, WatchTellsChangesOnce) {
  TestServer::Options options;
  options.attach = false;
  TestServer server(options);
  auto stub = grpc::health::v1::Health::NewStub(server.channel());
  grpc::ClientContext context;
  auto reader = stub->Watch(&context, {});
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server.Attach();
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  server.server().RefuseNew();
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);

  HealthCheckRequest unknown;
  unknown.set_service("nobody");
  grpc::ClientContext unknown_context;
  auto other = stub->Watch(&unknown_context, unknown);
  ASSERT_TRUE(other->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  server.server().Stop();
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(other->Read(&response));
  EXPECT_EQ(other->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

// --- Reflection ------------------------------------------------------------------------------------------------------

// What grpcurl does: list services, then fetch the files of each until a descriptor pool of its own can build them.
template <typename Service, typename Request, typename Response>
void DescribeEverything(const std::shared_ptr<grpc::Channel>& channel, const std::set<std::string>& expected) {
  auto stub = Service::NewStub(channel);
  grpc::ClientContext context;
  auto stream = stub->ServerReflectionInfo(&context);
  auto ask = [&](const Request& request) {
    Response response;
    EXPECT_TRUE(stream->Write(request));
    EXPECT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.original_request().SerializeAsString(), request.SerializeAsString());
    return response;
  };
  Request list;
  list.set_list_services("");
  std::set<std::string> names;
  const Response listed = ask(list);
  for (const auto& service : listed.list_services_response().service()) names.insert(service.name());
  EXPECT_EQ(names, expected);
  for (const std::string& name : names) {
    Request request;
    request.set_file_containing_symbol(name);
    google::protobuf::SimpleDescriptorDatabase database;
    const Response files = ask(request);
    for (const std::string& bytes : files.file_descriptor_response().file_descriptor_proto()) {
      google::protobuf::FileDescriptorProto file;
      ASSERT_TRUE(file.ParseFromString(bytes));
      database.Add(file);
    }
    google::protobuf::DescriptorPool pool(&database);
    const auto* service = pool.FindServiceByName(name);
    ASSERT_NE(service, nullptr) << name;
    EXPECT_GT(service->method_count(), 0);
  }
  Request request;
  request.set_file_by_filename("altiplano/inference/v1/inference.proto");
  EXPECT_GE(ask(request).file_descriptor_response().file_descriptor_proto_size(), 2);
  request.set_file_containing_symbol("altiplano.inference.v1.InferenceService.Generate");
  EXPECT_GE(ask(request).file_descriptor_response().file_descriptor_proto_size(), 2);
  request.set_file_containing_symbol("no.such.Thing");
  EXPECT_EQ(ask(request).error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  request.set_all_extension_numbers_of_type("altiplano.inference.v1.Load");
  EXPECT_EQ(ask(request).all_extension_numbers_response().base_type_name(), "altiplano.inference.v1.Load");
  request.mutable_file_containing_extension()->set_containing_type("altiplano.inference.v1.Load");
  request.mutable_file_containing_extension()->set_extension_number(100);
  EXPECT_EQ(ask(request).error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(ask({}).error_response().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(ReflectionTest, BothVersionsDescribeEveryService) {
  TestServer server;
  const std::set<std::string> common = {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                                        "grpc.reflection.v1alpha.ServerReflection"};
  std::set<std::string> main = common, admin = common;
  for (const char* name : {"InferenceService", "ModelService", "StatusService"}) {
    main.insert(std::string("altiplano.inference.v1.") + name);
  }
  admin.insert("altiplano.inference.v1.AdminService");
  namespace r1 = grpc::reflection::v1;
  namespace ra = grpc::reflection::v1alpha;
  DescribeEverything<r1::ServerReflection, r1::ServerReflectionRequest, r1::ServerReflectionResponse>(server.channel(),
                                                                                                      main);
  DescribeEverything<ra::ServerReflection, ra::ServerReflectionRequest, ra::ServerReflectionResponse>(server.channel(),
                                                                                                      main);
  DescribeEverything<r1::ServerReflection, r1::ServerReflectionRequest, r1::ServerReflectionResponse>(
      server.Channel(true), admin);
}

// --- Listening -------------------------------------------------------------------------------------------------------

TEST(ListenTest, APortInUseIsAClearError) {
  TestServer server;
  ServerOptions options;
  options.listen = server.server().address();
  auto second = Server::Start(options);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kUnavailable);
  const std::string why =
      " cannot listen on " + options.listen + ": Address already in use: end what listens there, or name another port";
  EXPECT_EQ(second.status().message(), "--listen:" + why);
  ServerOptions admin;
  admin.listen = "127.0.0.1:0";
  admin.admin_listen = options.listen;
  EXPECT_EQ(Server::Start(admin).status().message(), "--admin-listen:" + why);
  for (const char* malformed :
       {"", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", ":1", "127.0.0.1:99999", "nowhere.invalid:1"}) {
    options.listen = malformed;
    auto none = Server::Start(options);
    ASSERT_FALSE(none.ok()) << malformed;
    EXPECT_THAT(none.status().message(),
                ::testing::StartsWith(std::string("--listen: cannot listen on ") + malformed + ": "));
  }
}

TEST(ListenTest, UnixSocketsWork) {
  std::string path = ::testing::TempDir() + "/altiplano-" + std::to_string(getpid());
  TestServer::Options options;
  options.server.listen = "unix:" + path;
  options.server.admin_listen = "";
  TestServer server(options);
  EXPECT_EQ(server.server().port(), 0);
  EXPECT_EQ(server.server().address(), options.server.listen);
  EXPECT_EQ(server.server().admin_address(), "");
  EXPECT_EQ(Stream(server.stub(), TextRequest("hi", 2)).text(), "ab");
}

// Those that start at the same moment do not take it from each other.
TEST(ListenTest, OneOfManyGetsASocket) {
  ServerOptions options;
  options.listen = "unix:" + ::testing::TempDir() + "/altiplano-many-" + std::to_string(getpid());
  for (int round = 0; round < 10; ++round) {
    std::latch all(4);
    std::vector<std::future<StatusOr<std::unique_ptr<Server>>>> starts;
    for (int i = 0; i < 4; ++i) {
      starts.push_back(std::async(std::launch::async, [&] {
        all.arrive_and_wait();
        return Server::Start(options);
      }));
    }
    std::vector<std::unique_ptr<Server>> started;
    for (auto& start : starts) {
      auto server = start.get();
      if (server.ok()) started.push_back(*std::move(server));
    }
    EXPECT_EQ(started.size(), 1u);
  }
}

TEST(ListenTest, ASocketIsTakenFromTheDeadOnly) {
  const std::string path = ::testing::TempDir() + "/altiplano-taken-" + std::to_string(getpid());
  TestServer::Options options;
  options.server.listen = "unix:" + path;
  options.server.admin_listen = "";
  {  // left over from a server that was killed: bound, and nobody listens
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    ASSERT_LT(path.size(), sizeof to.sun_path);
    path.copy(to.sun_path, path.size());
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ASSERT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to), 0);
    close(fd);
  }
  TestServer server(options);
  for (const char* prefix : {"unix:", "unix://"}) {
    ServerOptions second;
    second.listen = prefix + path;
    auto refused = Server::Start(second);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.status().code(), Code::kUnavailable);
    EXPECT_EQ(refused.status().message(),
              "--listen: cannot listen on " + second.listen +
                  ": Address already in use: end what listens there or remove the file, or name another path");
  }
  EXPECT_EQ(Stream(server.stub(), TextRequest("hi", 2)).text(), "ab") << "it still serves";
}

}  // namespace
}  // namespace altiplano::testing

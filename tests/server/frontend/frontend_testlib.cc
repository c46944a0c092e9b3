#include "tests/server/frontend/frontend_testlib.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <thread>

#include "server/frontend/prepare.h"

namespace altiplano::testing {

namespace v1 = inference::v1;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

std::shared_ptr<const Tokenizer> TinyTokenizer() {
  static const std::shared_ptr<const Tokenizer> tokenizer = [] {
    auto loaded = Tokenizer::FromHuggingFace(ReadFile(ALTIPLANO_SOURCE_DIR "/tests/data/tiny/tokenizer.json"));
    if (!loaded.ok()) {
      ADD_FAILURE() << loaded.status().ToString();
      abort();
    }
    return *loaded;
  }();
  return tokenizer;
}

std::vector<TokenId> Encode(std::string_view text) {
  std::vector<TokenId> ids;
  TinyTokenizer()->Encode(text, &ids);
  return ids;
}

std::vector<TokenId> ByteTokens(std::string_view text) {
  static const std::vector<TokenId> by_byte = [] {
    std::vector<TokenId> out(256, -1);
    for (TokenId id = 0; id < TinyTokenizer()->vocab_size(); ++id) {
      std::string_view bytes = TinyTokenizer()->TokenBytes(id);
      if (bytes.size() == 1 && !TinyTokenizer()->IsSpecial(id)) out[static_cast<unsigned char>(bytes[0])] = id;
    }
    return out;
  }();
  std::vector<TokenId> ids;
  for (char c : text) ids.push_back(by_byte[static_cast<unsigned char>(c)]);
  return ids;
}

std::string Decode(const std::vector<TokenId>& ids) {
  return DecodeTokens(ids, /*keep_special=*/false, TinyTokenizer());
}

ServedModel TinyModel() {
  ServedModel model;
  model.name = "tiny";
  model.architecture = "llama";
  model.parameters = 4'100'000;
  model.max_context = 4096;
  model.vocab_size = 2048;
  model.weight_dtype = "bf16";
  model.kv_dtype = "bf16";
  model.eos_ids = {1793, 1800, kEot};
  model.tokenizer = TinyTokenizer();
  auto format = ChatFormat::FromName("llama3.1");
  EXPECT_TRUE(format.ok());
  model.chat_format = *format;
  return model;
}

void Eventually(const std::function<bool()>& condition) {
  TimePoint deadline = Clock::Real().Now() + std::chrono::seconds(20);
  while (!condition()) {
    ASSERT_LT(Clock::Real().Now(), deadline) << "it never came true";
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TokenId Alphabet(const Request&, uint32_t, int32_t index) {
  static const std::vector<TokenId> letters = ByteTokens("abcdefghijklmnopqrstuvwxyz");
  return letters[static_cast<size_t>(index) % letters.size()];
}

Script Say(std::vector<TokenId> tokens) {
  return [tokens = std::move(tokens)](const Request&, uint32_t, int32_t index) {
    return index < static_cast<int32_t>(tokens.size()) ? tokens[static_cast<size_t>(index)] : kEot;
  };
}

// --- ScriptedExecutor ------------------------------------------------------------------------------------------------

ScriptedExecutor::ScriptedExecutor(std::shared_ptr<Control> control)
    : control_(std::move(control)), thread_([this] { Loop(); }) {}

ScriptedExecutor::~ScriptedExecutor() {
  {
    std::lock_guard lock(control_->mutex);
    stop_ = true;
  }
  control_->changed.notify_all();
  thread_.join();
}

void ScriptedExecutor::Launch(std::shared_ptr<const StepPlan> plan) {
  {
    std::lock_guard lock(control_->mutex);
    plans_.push_back(std::move(plan));
  }
  control_->changed.notify_all();
}

StepResult ScriptedExecutor::Wait() {
  std::unique_lock lock(control_->mutex);
  control_->changed.wait(lock, [&] { return !results_.empty(); });
  StepResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

void ScriptedExecutor::Loop() {
  Control& control = *control_;
  std::unique_lock lock(control.mutex);
  for (;;) {
    control.changed.wait(lock, [&] { return stop_ || (!control.held && !plans_.empty()); });
    if (stop_) return;
    std::shared_ptr<const StepPlan> plan = std::move(plans_.front());
    plans_.pop_front();
    Script script = control.script;
    Status failure = std::exchange(control.failure, OkStatus());
    Duration step_time = control.step_time;
    lock.unlock();
    if (step_time > Duration(0)) std::this_thread::sleep_for(step_time);
    StepResult result = Run(*plan, script);
    result.status = failure;
    lock.lock();
    results_.push_back(std::move(result));
    ++control.steps;
    control.changed.notify_all();
  }
}

StepResult ScriptedExecutor::Run(const StepPlan& plan, const Script& script) {
  for (const SlotInit& init : plan.slot_inits) slots_[init.slot] = init;
  StepResult result;
  result.step = plan.step;
  auto fill_top = [](int32_t count, TokenScore* score) {
    for (int32_t i = 0; i < count; ++i) score->top.push_back({.token = i, .logprob = -1.0F - static_cast<float>(i)});
  };
  for (const PlannedSequence& planned : plan.sequences) {
    const SlotInit& slot = slots_.at(planned.slot);
    if (planned.num_prompt_scores > 0) {
      auto& scores = result.prompt_scores.emplace_back();
      for (int32_t i = 0; i < planned.num_prompt_scores; ++i) {
        TokenScore score;
        score.token = plan.prompt_score_ids[static_cast<size_t>(planned.prompt_score_begin + i)];
        score.logprob = -0.25F;
        score.rank = 2;
        fill_top(slot.request->sampling.prompt_top_logprobs, &score);
        scores.push_back(std::move(score));
      }
    }
    if (!planned.sample) continue;
    auto prompt = static_cast<int32_t>(slot.request->prompt.size());
    TokenScore score;
    score.token = script(*slot.request, planned.sequence, planned.first_position + planned.num_tokens - prompt);
    score.finite = score.token != kNotANumber;
    score.logprob = -0.5F;
    score.rank = 1;
    fill_top(slot.request->sampling.top_logprobs, &score);
    result.sampled.push_back(std::move(score));
  }
  return result;
}

// --- TestServer ------------------------------------------------------------------------------------------------------

TestServer::Options::Options() {
  server.listen = "127.0.0.1:0";
  server.admin_listen = "127.0.0.1:0";
  server.version = "1.2.3";
  server.commit = "abc";
  server.device = "a test";
  engine.scheduler.num_blocks = 1024;
  engine.scheduler.block_size = 16;
  engine.scheduler.max_running = 128;
  engine.scheduler.token_budget = 2048;
  engine.scheduler.max_context = model.max_context;
  engine.scheduler.eos_ids = model.eos_ids;
}

TestServer::TestServer(Options options)
    : options_(std::move(options)), control_(std::make_shared<ScriptedExecutor::Control>()) {
  auto server = Server::Start(options_.server);
  EXPECT_TRUE(server.ok()) << server.status().ToString();
  server_ = std::move(*server);
  channel_ = Channel();
  stub_ = v1::InferenceService::NewStub(channel_);
  if (options_.attach) Attach();
}

void TestServer::Attach() {
  auto engine = Engine::Start(options_.engine, std::make_unique<ScriptedExecutor>(control_), server_->step_callback());
  EXPECT_TRUE(engine.ok()) << engine.status().ToString();
  engine_ = std::move(*engine);
  server_->Attach(engine_.get(), options_.model);
}

TestServer::~TestServer() {
  Release();
  server_->Stop();
  // gRPC lets go of a call's object on its own threads, a moment after the call has ended.
  LiveObjects live = server_->live_objects();
  for (int i = 0; i < 1000 && live.calls + live.text_jobs + live.watchers > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    live = server_->live_objects();
  }
  EXPECT_EQ(live.calls, 0);
  EXPECT_EQ(live.text_jobs, 0);
  EXPECT_EQ(live.watchers, 0);
  server_.reset();
  engine_.reset();
}

std::shared_ptr<grpc::Channel> TestServer::Channel(bool admin) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(admin ? server_->admin_address() : server_->address(),
                                   grpc::InsecureChannelCredentials(), arguments);
}

void TestServer::SetScript(Script script) {
  std::lock_guard lock(control_->mutex);
  control_->script = std::move(script);
}

void TestServer::Hold() {
  std::lock_guard lock(control_->mutex);
  control_->held = true;
}

void TestServer::Release() {
  {
    std::lock_guard lock(control_->mutex);
    control_->held = false;
  }
  control_->changed.notify_all();
}

void TestServer::FailNextStep(Status status) {
  std::lock_guard lock(control_->mutex);
  control_->failure = std::move(status);
}

void TestServer::SetStepTime(Duration time) {
  std::lock_guard lock(control_->mutex);
  control_->step_time = time;
}

int64_t TestServer::steps() {
  std::lock_guard lock(control_->mutex);
  return control_->steps;
}

void TestServer::WaitForNoCalls() {
  Eventually([&] {
    LiveObjects live = server_->live_objects();
    return live.calls == 0 && live.sinks == 0 && live.text_jobs == 0 && live.watchers == 0 &&
           server_->live_requests() == 0 && engine_->load().scheduler.blocks_used == 0;
  });
}

// --- Streams ---------------------------------------------------------------------------------------------------------

namespace {

template <typename Visit>
void ForEachDelta(const StreamResult& result, uint32_t index, Visit visit) {
  for (const auto& message : result.messages) {
    for (const v1::Delta& delta : message.deltas().items()) {
      if (delta.index() == index) visit(delta);
    }
  }
}

}  // namespace

std::string StreamResult::text(uint32_t index) const {
  std::string out;
  ForEachDelta(*this, index, [&](const v1::Delta& delta) { out += delta.text(); });
  return out;
}

std::vector<uint32_t> StreamResult::token_ids(uint32_t index) const {
  std::vector<uint32_t> out;
  ForEachDelta(*this, index,
               [&](const v1::Delta& d) { out.insert(out.end(), d.token_ids().begin(), d.token_ids().end()); });
  return out;
}

uint32_t StreamResult::num_tokens(uint32_t index) const {
  uint32_t out = 0;
  ForEachDelta(*this, index, [&](const v1::Delta& delta) { out += delta.num_tokens(); });
  return out;
}

std::optional<v1::Finish> StreamResult::finish(uint32_t index) const {
  std::optional<v1::Finish> out;
  ForEachDelta(*this, index, [&](const v1::Delta& delta) {
    EXPECT_FALSE(out.has_value()) << "a delta after the finish";
    if (delta.has_finish()) out = delta.finish();
  });
  return out;
}

const v1::Prompt* StreamResult::started() const {
  return !messages.empty() && messages.front().has_started() ? &messages.front().started() : nullptr;
}

const v1::Completed* StreamResult::completed() const {
  return !messages.empty() && messages.back().has_completed() ? &messages.back().completed() : nullptr;
}

StreamResult Stream(v1::InferenceService::Stub& stub, const v1::StreamGenerateRequest& request,
                    grpc::ClientContext* context) {
  grpc::ClientContext own;
  auto reader = stub.StreamGenerate(context != nullptr ? context : &own, request);
  StreamResult result;
  v1::StreamGenerateResponse message;
  while (reader->Read(&message)) {
    EXPECT_EQ(message.sequence_number(), result.messages.size());
    result.messages.push_back(message);
  }
  result.status = reader->Finish();
  return result;
}

StreamResult Stream(v1::InferenceService::Stub& stub, const v1::GenerateRequest& request) {
  v1::StreamGenerateRequest wrapped;
  *wrapped.mutable_request() = request;
  return Stream(stub, wrapped);
}

v1::GenerateRequest TextRequest(std::string text, uint32_t max_new_tokens) {
  v1::GenerateRequest request;
  request.set_text(std::move(text));
  if (max_new_tokens > 0) request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
  return request;
}

std::string ReasonOf(const grpc::Status& status) {
  auto info = DetailOf<google::rpc::ErrorInfo>(status);
  if (!info) return "";
  EXPECT_EQ(info->domain(), "altiplano.inference.v1");
  return info->reason();
}

std::string FirstField(const grpc::Status& status) {
  auto bad = DetailOf<google::rpc::BadRequest>(status);
  return bad && bad->field_violations_size() > 0 ? bad->field_violations(0).field() : "";
}

}  // namespace altiplano::testing

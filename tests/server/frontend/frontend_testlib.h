// What front end tests share: the tiny model's tokenizer, an executor that answers from a script, and a server with a
// client in one process.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "altiplano/inference/v1/admin.grpc.pb.h"
#include "altiplano/inference/v1/inference.grpc.pb.h"
#include "altiplano/inference/v1/model.grpc.pb.h"
#include "altiplano/inference/v1/status.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/engine/engine.h"
#include "server/frontend/server.h"

namespace altiplano::testing {

inline constexpr TokenId kBos = 1792;
inline constexpr TokenId kEot = 1801;
inline constexpr TokenId kNotANumber = -2;  // of a Script: this token's logits are not finite

std::string ReadFile(const std::string& path);
std::shared_ptr<const Tokenizer> TinyTokenizer();
std::vector<TokenId> Encode(std::string_view text);  // no BOS
// One token for each byte: splits code points and words anywhere.
std::vector<TokenId> ByteTokens(std::string_view text);
std::string Decode(const std::vector<TokenId>& ids);
ServedModel TinyModel();

// Calls until true; fails the test after 20 s. For what other threads bring about, never for how long it takes.
void Eventually(const std::function<bool()>& condition);

// The token that `sequence` samples after `index` others.
using Script = std::function<TokenId(const Request& request, uint32_t sequence, int32_t index)>;
// "abc...zabc..." for ever.
TokenId Alphabet(const Request& request, uint32_t sequence, int32_t index);
// These tokens, then end-of-turn.
Script Say(std::vector<TokenId> tokens);

// Steps run on a thread of its own. Any thread may change script or gate between steps.
class ScriptedExecutor : public Executor {
 public:
  struct Control {
    std::mutex mutex;
    std::condition_variable changed;
    Script script = Alphabet;
    bool held = false;  // steps wait
    Status failure;     // not OK: the next step fails
    Duration step_time{};
    int64_t steps = 0;
  };
  explicit ScriptedExecutor(std::shared_ptr<Control> control);
  ~ScriptedExecutor() override;
  void Launch(std::shared_ptr<const StepPlan> plan) override;
  StepResult Wait() override;

 private:
  void Loop();
  StepResult Run(const StepPlan& plan, const Script& script);

  const std::shared_ptr<Control> control_;
  std::unordered_map<int32_t, SlotInit> slots_;
  std::deque<std::shared_ptr<const StepPlan>> plans_;
  std::deque<StepResult> results_;
  bool stop_ = false;
  std::thread thread_;
};

class TestServer {
 public:
  struct Options {
    ServerOptions server;
    EngineOptions engine;
    ServedModel model = TinyModel();
    bool attach = true;
    Options();
  };
  explicit TestServer(Options options = Options());
  ~TestServer();

  void Attach();
  Server& server() { return *server_; }
  Engine& engine() { return *engine_; }
  // A channel of its own each time.
  std::shared_ptr<grpc::Channel> Channel(bool admin = false);
  const std::shared_ptr<grpc::Channel>& channel() { return channel_; }
  inference::v1::InferenceService::Stub& stub() { return *stub_; }

  void SetScript(Script script);
  void Hold();
  void Release();
  void FailNextStep(Status status);
  void SetStepTime(Duration time);
  int64_t steps();
  void WaitForNoCalls();  // all live-object counters back at zero

 private:
  Options options_;
  std::shared_ptr<ScriptedExecutor::Control> control_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Engine> engine_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<inference::v1::InferenceService::Stub> stub_;
};

// A whole stream, read to its end.
struct StreamResult {
  grpc::Status status;
  std::vector<inference::v1::StreamGenerateResponse> messages;

  std::string text(uint32_t index = 0) const;
  std::vector<uint32_t> token_ids(uint32_t index = 0) const;
  std::optional<inference::v1::Finish> finish(uint32_t index = 0) const;
  const inference::v1::Prompt* started() const;
  const inference::v1::Completed* completed() const;
  uint32_t num_tokens(uint32_t index = 0) const;
};
StreamResult Stream(inference::v1::InferenceService::Stub& stub, const inference::v1::StreamGenerateRequest& request,
                    grpc::ClientContext* context = nullptr);
StreamResult Stream(inference::v1::InferenceService::Stub& stub, const inference::v1::GenerateRequest& request);

inference::v1::GenerateRequest TextRequest(std::string text, uint32_t max_new_tokens = 0);

// google.rpc.Status of a failed call.
template <typename Detail>
std::optional<Detail> DetailOf(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  for (const auto& any : details.details()) {
    Detail detail;
    if (any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}
std::string ReasonOf(const grpc::Status& status);
std::string FirstField(const grpc::Status& status);  // of BadRequest; "" if none

}  // namespace altiplano::testing

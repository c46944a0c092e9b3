// The native gRPC client of the commands: one server, blocking calls, errors as Status with the server's details.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "altiplano/inference/v1/inference.pb.h"
#include "altiplano/inference/v1/model.pb.h"
#include "altiplano/inference/v1/status.pb.h"
#include "server/base/clock.h"
#include "server/base/status.h"

// gRPC's headers and the generated services are seconds of compiling for each file that sees them.
namespace grpc {
class Channel;
class ClientContext;
class Status;
}  // namespace grpc

namespace altiplano::cli {

namespace v1 = inference::v1;

// Lets another thread end calls: those in progress, and later ones at once.
class Cancellation {
 public:
  void Cancel();  // any thread
  void Reset();
  bool cancelled();

 private:
  friend class Client;
  friend class GenerateReactor;
  using Context = std::shared_ptr<grpc::ClientContext>;
  void Enter(const Context& context);
  void Leave(const Context& context);

  std::mutex mutex_;
  std::unordered_set<Context> contexts_;  // of the calls in progress
  bool cancelled_ = false;
};

// One streamed answer, seen from here: times are of this side's clock.
struct Answer {
  v1::Prompt prompt;  // as `started` said
  std::vector<v1::Finish> finishes;
  v1::Usage usage;
  v1::Timing timing;
  Duration first_token{};           // request sent to first delta; zero: none came
  Duration total{};                 // request sent to end
  std::vector<Duration> intervals;  // between deltas
  uint64_t tokens = 0;              // of all deltas
  uint64_t first_tokens = 0;        // of the first

  // Tokens per second after the first, by the server's times when it has said them; 0 when there are too few to say.
  double TokensPerSecond() const;
};

// Any thread; calls may run side by side.
class Client {
 public:
  ~Client();

  // url: "HOST:PORT", "unix:/path" or with the scheme grpc://. UNAVAILABLE when no connection comes about in `wait`.
  static StatusOr<std::unique_ptr<Client>> Connect(const std::string& url, Duration wait);

  using OnDelta = std::function<void(const v1::Delta&)>;
  // Blocks until the stream has ended. On error *answer holds what came before.
  Status StreamGenerate(const v1::GenerateRequest& request, const OnDelta& on_delta, Answer* answer,
                        Cancellation* cancellation = nullptr);
  // Returns at once. on_delta and then, once, done are called on threads of gRPC. The client and the cancellation must
  // live until then.
  using OnEnd = std::function<void(const Status&, Answer)>;
  void StartGenerate(const v1::GenerateRequest& request, OnDelta on_delta, OnEnd done,
                     Cancellation* cancellation = nullptr);

  StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request);
  StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request);
  StatusOr<v1::ListModelsResponse> ListModels();
  StatusOr<v1::GetServerInfoResponse> GetServerInfo();
  StatusOr<v1::Load> GetLoad();
  // Of an admin address.
  StatusOr<std::string> DumpFlightRecord(uint32_t replica);
  // grpc.health.v1 of `service` ("": the server): "SERVING", "NOT_SERVING", ... NOT_FOUND for a service it has not.
  StatusOr<std::string> Health(const std::string& service, Duration timeout);

 private:
  struct Stubs;
  explicit Client(std::shared_ptr<grpc::Channel> channel);

  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<Stubs> stubs_;
};

// With the google.rpc details (reason, metadata, field violations, retry) that came along.
Status FromGrpc(const grpc::Status& status);

// For people, one or more lines without a newline at the end:
//   INVALID_ARGUMENT: ...
//     sampling.top_p: is 1.5, must be in (0, 1]
//     reason CONTEXT_LENGTH_EXCEEDED (limit 8192, actual 9000); retry after 250 ms
std::string DescribeError(const Status& status);

}  // namespace altiplano::cli

// Server: the gRPC front end. Listens before the model is there, takes an engine when it is, drains, stops.
//
// Life: Start (health NOT_SERVING, calls answer UNAVAILABLE LOADING) -> Attach (serves) -> Drain -> Stop.
//
//   auto server = Server::Start(options);
//   auto engine = Engine::Start(engine_options, std::move(executor), (*server)->step_callback());
//   (*server)->Attach(engine->get(), model);
//   ...
//   (*server)->Drain(grace);
//   (*server)->Stop();   // before the engine goes
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/engine/device_memory.h"
#include "server/engine/engine.h"
#include "server/frontend/limits.h"
#include "server/text/chat_format.h"
#include "server/text/tokenizer.h"

namespace altiplano {

// What a request that leaves a sampling field unset gets: the model's generation_config. Unset here: temperature 1,
// everything else off.
struct SamplingDefaults {
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int32_t> top_k;
};

struct ServedModel {
  std::string name;          // requests with another name are NOT_FOUND; with none they get this one
  std::string architecture;  // "llama"
  uint64_t parameters = 0;
  int32_t max_context = 0;  // prompt and answer together
  int32_t vocab_size = 0;   // of the model: ids are [0, vocab_size), the tokenizer may know fewer
  std::string weight_dtype;
  std::string kv_dtype;
  int32_t tensor_parallel = 1;
  int32_t pipeline_parallel = 1;
  std::vector<DeviceMemory> devices;  // of this node, for GetServerInfo
  std::vector<TokenId> eos_ids;
  std::vector<std::string> features;  // free words for GetModel, besides the front end's own
  SamplingDefaults defaults;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatFormat> chat_format;  // null: chat prompts are FAILED_PRECONDITION naming --chat-format
};

struct ServerOptions {
  // "host:port" (port 0: any free one), "[::1]:port" or "unix:path".
  std::string listen = "127.0.0.1:50051";
  std::string admin_listen;  // AdminService; "": none
  FrontendLimits limits;
  int32_t text_threads = 2;
  std::string version;
  std::string commit;
  std::string device;                               // for GetServerInfo; Attach may replace it
  Duration drain_grace = std::chrono::seconds(30);  // of AdminService.Drain without one
};

// Objects that live as long as a call does. All zero when no call is open: tests and metrics look for leaks with it.
struct LiveObjects {
  int64_t calls = 0;      // Generate and StreamGenerate, until gRPC is done with them
  int64_t sinks = 0;      // held by the engine
  int64_t text_jobs = 0;  // waiting for or in the text pool
  int64_t watchers = 0;   // Health.Watch and WatchLoad
};

class Server {
 public:
  // Listens. UNAVAILABLE naming the address when it cannot be had (in use, not ours, malformed).
  static StatusOr<std::unique_ptr<Server>> Start(ServerOptions options);
  // Stop().
  ~Server();

  // What Engine::Start wants as on_step. Stays valid after the server is gone.
  std::function<void()> step_callback() const;

  // Serves this model from now on; health becomes SERVING. Once. The engine must outlive Stop().
  void Attach(InferenceEngine* engine, ServedModel model, std::string device = {});

  // What health says while nothing else speaks against it (no model, draining, engine unhealthy). Calls are still
  // taken.
  void SetServing(bool serving);
  // The process will end: health is NOT_SERVING for good, and AdminService.Resume is refused. Calls are still taken.
  void AnnounceEnd();
  // New generations are refused with UNAVAILABLE DRAINING; health is NOT_SERVING. Live ones go on.
  void RefuseNew();
  // Back to normal after SetServing(false), RefuseNew or Drain. FAILED_PRECONDITION after AnnounceEnd or Stop.
  Status Resume();
  // RefuseNew, then waits until no generation is live or the grace is over; what is left ends with UNAVAILABLE.
  void Drain(Duration grace);
  // Stops at once: live calls end with UNAVAILABLE, listeners close. Idempotent. Afterwards nothing refers to the
  // engine.
  void Stop();

  int port() const;                          // 0 for a unix socket
  const std::string& address() const;        // as given, with the port that was taken
  const std::string& admin_address() const;  // "": none
  int32_t live_requests() const;             // generations accepted and not yet ended
  LiveObjects live_objects() const;

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace altiplano

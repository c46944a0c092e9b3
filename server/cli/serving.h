// A listening server and the model behind it: what `serve` and the offline commands have in common.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "altiplano/config/v1/server_config.pb.h"
#include "server/base/status.h"
#include "server/cli/load_model.h"
#include "server/frontend/limits.h"

namespace altiplano::cli {

void InitLog(const config::v1::Log& config);
FrontendLimits LimitsOf(const config::v1::Limits& config);

// One thread, but for what the members say.
class Serving {
 public:
  // Listens; health is NOT_SERVING and calls get UNAVAILABLE LOADING. UNAVAILABLE when the address cannot be had.
  static StatusOr<std::unique_ptr<Serving>> Listen(const config::v1::ServerConfig& config);
  ~Serving();

  // Loads the model and serves it. hooks.on_step is not used. Errors as LoadModel's.
  Status Load(LoadHooks hooks);

  void AnnounceEnd();  // health NOT_SERVING for good; requests are still taken
  void RefuseNew();    // UNAVAILABLE DRAINING
  int32_t live_requests() const;
  bool failed_for_good() const;  // the engine, after Load
  void Stop();                   // live requests end with UNAVAILABLE

  const std::string& address() const;        // with the port that was taken
  const std::string& admin_address() const;  // "": none
  const LoadedModel& model() const;          // after Load

 private:
  class Impl;
  explicit Serving(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace altiplano::cli

#include <cstdio>

#include "server/base/strings.h"
#include "server/cli/client.h"
#include "server/cli/command.h"
#include "server/cli/request_flags.h"

namespace altiplano::cli {

namespace {

int RunHealth(const ParsedFlags& flags) {
  TimePoint deadline = Clock::Real().Now() + flags.duration("timeout");
  auto client = Client::Connect(flags.text("url"), flags.duration("timeout"));
  if (!client.ok()) return Fail("health", client.status().message(), kExitFailure);
  auto health = (*client)->Health(flags.text("service"), deadline - Clock::Real().Now());
  if (!health.ok()) return Fail("health", health.status().ToString(), kExitFailure);
  std::printf("%s\n", health->c_str());
  return *health == "SERVING" ? kExitOk : kExitFailure;
}

}  // namespace

Subcommand HealthCommand() {
  return {.command =
              {.name = "health",
               .summary =
                   "ask a server whether it serves; exit code 0 when it does, 1 when not (for container health checks)",
               .synopsis = "altiplano health [--url HOST:PORT]",
               .flags = {UrlFlag(),
                         {.name = "service",
                          .type = FlagType::kText,
                          .meaning = "Which service of it. Without: the server as a whole.",
                          .example = "altiplano.inference.v1.InferenceService"},
                         {.name = "timeout",
                          .type = FlagType::kDuration,
                          .default_value = "2s",
                          .meaning = "How long to wait for connection and answer together.",
                          .example = "500ms"}}},
          .run = RunHealth};
}

}  // namespace altiplano::cli

#include "server/cli/version.h"

#include <google/protobuf/stubs/common.h>
#include <grpcpp/grpcpp.h>

#include <cstdio>

#include "kernels/device.h"
#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"

namespace altiplano::cli {

namespace {

int RunVersion(const ParsedFlags& flags) {
  if (flags.boolean("json")) {
    OrderedJson json = {{"version", kVersion},
                        {"commit", kCommit},
                        {"api", "altiplano.inference.v1"},
                        {"cuda", DescribeCuda()},
                        {"compiler", __VERSION__},
                        {"grpc", grpc::Version()},
                        {"protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION)}};
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    std::printf("altiplano %s (commit %s), %s\n", kVersion, kCommit, DescribeCuda().c_str());
  }
  return kExitOk;
}

}  // namespace

Subcommand VersionCommand() {
  return {.command = {.name = "version",
                      .summary = "what this program is",
                      .synopsis = "altiplano version [--json]",
                      .flags = {{.name = "json",
                                 .type = FlagType::kBool,
                                 .default_value = "false",
                                 .meaning = "Print a JSON object, with the compiler and the libraries too."}}},
          .run = RunVersion};
}

}  // namespace altiplano::cli

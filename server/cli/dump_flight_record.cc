// Fetches the record of a server's last steps.
#include <cstdio>

#include "server/base/strings.h"
#include "server/cli/client.h"
#include "server/cli/command.h"
#include "server/cli/request_flags.h"
#include "server/cli/write_file.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kDumpFlightRecord = "admin dump-flight-record";

int RunDumpFlightRecord(const ParsedFlags& flags) {
  if (flags.positional().size() != 1) return Fail(kDumpFlightRecord, "needs one FILE to write", kExitUsage);
  const std::string& path = flags.positional()[0];
  if (!flags.given("url"))
    return Fail(kDumpFlightRecord, "needs --url: what the server was given as --admin-listen", kExitUsage);
  auto client = Client::Connect(flags.text("url"), std::chrono::seconds(5));
  if (!client.ok()) return Fail(kDumpFlightRecord, client.status().message(), kExitUnavailable);
  auto record = (*client)->DumpFlightRecord(static_cast<uint32_t>(flags.count("replica")));
  if (record.status().code() == Code::kUnimplemented) {
    return Fail(
        kDumpFlightRecord,
        StrCat(flags.text("url"), " has no AdminService: give --url what the server was given as --admin-listen"),
        kExitUsage);
  }
  if (!record.ok()) return FailCall(kDumpFlightRecord, record.status());
  if (Status status = WriteFile(path, *record); !status.ok())
    return Fail(kDumpFlightRecord, status.message(), kExitUnavailable);
  std::printf("%s: %s\n", path.c_str(), HumanBytes(record->size()).c_str());
  return kExitOk;
}

}  // namespace

Subcommand DumpFlightRecordCommand() {
  Flag url = UrlFlag();
  url.meaning = "The server's admin address.";
  url.default_value = "";
  url.example = "127.0.0.1:50052";
  return {.command = {.name = kDumpFlightRecord,
                      .summary = "fetch the record of the scheduler's last steps from a server",
                      .synopsis = "altiplano admin dump-flight-record FILE --url ADMIN_HOST:PORT",
                      .notes = "altiplano replay FILE shows what is in it. No prompts or answers are.",
                      .flags = {url,
                                {.name = "replica",
                                 .type = FlagType::kCount,
                                 .default_value = "0",
                                 .meaning = "Which replica's: each has a scheduler of its own.",
                                 .example = "1",
                                 .max = 1023}},
                      .max_positional = 1},
          .run = RunDumpFlightRecord};
}

}  // namespace altiplano::cli

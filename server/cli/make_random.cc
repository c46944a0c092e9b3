// Random weights on disk, in the shape of a published model: for measuring what does not depend on the numbers.
#include <cstdio>

#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/stop_signal.h"
#include "server/cli/terminal.h"
#include "server/model/random_checkpoint.h"
#include "server/model/write_folder.h"

namespace altiplano::cli {

namespace {

constexpr std::string_view kMakeRandom = "make-random";

int RunMakeRandom(const ParsedFlags& flags) {
  if (flags.positional().empty() || flags.positional()[0].empty())
    return Fail(kMakeRandom, "needs the folder to write", kExitUsage);
  std::string name = StrCat(kRandomPrefix, flags.text("like"), ",seed=", flags.count("seed"));
  if (flags.given("layers")) name += StrCat(",layers=", flags.count("layers"));
  auto model = ParseRandomModel(name);
  if (!model.ok()) return Fail(kMakeRandom, model.status().message(), kExitUsage);
  const auto checkpoint = MakeRandomCheckpoint(*model);
  WriteOptions options;
  options.max_file_bytes = flags.bytes("max-file-size");
  options.progress = LoadProgressPrinter("writing weights");
  StopSignal stop;
  options.cancelled = [&stop] { return stop.count() > 0; };
  const std::string& folder = flags.positional()[0];
  if (Status status = WriteFolder(*checkpoint, folder, options); !status.ok()) {
    return Fail(kMakeRandom, status.message(),
                status.code() == Code::kFailedPrecondition ? kExitUsage : kExitUnavailable);
  }
  std::printf("%s: %s of random bf16 weights and a byte tokenizer\n", folder.c_str(),
              HumanBytes(checkpoint->total_bytes()).c_str());
  return kExitOk;
}

}  // namespace

Subcommand MakeRandomCommand() {
  return {
      .command = {.name = kMakeRandom,
                  .summary = "write a checkpoint of random weights, to measure with",
                  .synopsis = "altiplano make-random --like 8b [--layers N] FOLDER",
                  .notes =
                      "The folder holds config.json, safetensors and a tokenizer.json with one token for each byte, "
                      "made-up words\n"
                      "and Llama 3.1's special tokens; a real tokenizer.json may take its place. The disk's room is "
                      "checked first.\n"
                      "Without a disk: --model random:8b,layers=N,seed=N makes the same numbers when they are read.",
                  .flags = {{.name = "like",
                             .type = FlagType::kChoice,
                             .default_value = "8b",
                             .meaning = "The published model whose shape it has.",
                             .example = "1b",
                             .choices = "1b|3b|8b|70b|405b"},
                            {.name = "layers",
                             .type = FlagType::kCount,
                             .meaning = "Only so many layers. Without it: all.",
                             .example = "4",
                             .min = 1,
                             .max = 126},
                            {.name = "seed",
                             .type = FlagType::kCount,
                             .default_value = "1",
                             .meaning = "Of the numbers.",
                             .example = "7",
                             .min = 0},
                            {.name = "max-file-size",
                             .type = FlagType::kBytes,
                             .default_value = "5GB",
                             .meaning = "Weights of one file; more are spread over several with an index.",
                             .example = "2GB"}},
                  .max_positional = 1},
      .run = RunMakeRandom};
}

}  // namespace altiplano::cli

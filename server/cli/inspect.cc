#include "server/model/inspect.h"

#include <cstdio>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_model.h"

namespace altiplano::cli {

namespace {

int RunInspect(const ParsedFlags& flags) {
  if (flags.given("model") == !flags.positional().empty()) {
    return Fail("inspect", "needs one model: altiplano inspect DIR_OR_GGUF", kExitUsage);
  }
  std::string path = flags.given("model") ? flags.text("model") : flags.positional()[0];
  auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return Fail("inspect", checkpoint.status().message(), ExitCodeOfLoad(checkpoint.status()));
  Inspection inspection = Inspect(**checkpoint);
  // What the text layer would make of it; a checkpoint that it cannot serve is still worth looking at.
  std::string chat = "none in the checkpoint";
  if (inspection.has_chat_template) {
    auto format = ChatFormat::FromTemplate((*checkpoint)->text_assets().chat_template);
    chat = format.ok() ? std::string((*format)->name()) : format.status().message();
  }
  Status text;  // of weights alone there is none to check
  if (inspection.tokenizer != "none") text = LoadTokenizer(**checkpoint).status();
  if (flags.boolean("json")) {
    OrderedJson json = InspectJson(inspection);
    json["chat_format"] = chat;
    std::printf("%s\n", json.dump(2, ' ', false, OrderedJson::error_handler_t::replace).c_str());
  } else {
    std::fputs(InspectText(inspection, flags.boolean("tensors")).c_str(), stdout);
    std::printf("%-16s %s\n", "chat format", chat.c_str());
  }
  if (!text.ok()) return Fail("inspect", text.message(), ExitCodeOfLoad(text));
  return kExitOk;
}

}  // namespace

Subcommand InspectCommand() {
  Subcommand subcommand{
      .command = {.name = "inspect",
                  .summary =
                      "what a checkpoint is and what it needs: weights, KV bytes per token, ranks it can be split into",
                  .synopsis = "altiplano inspect DIR_OR_GGUF [--json] [--tensors]",
                  .notes = "Everything is checked, the tokenizer too; no weights are read. Exit code 65: something is "
                           "wrong with the\n"
                           "files, and stderr says what.",
                  .flags = {{.name = "json",
                             .type = FlagType::kBool,
                             .default_value = "false",
                             .meaning = "Print one JSON object; sizes are bytes."},
                            {.name = "tensors",
                             .type = FlagType::kBool,
                             .default_value = "false",
                             .meaning = "List every tensor too."}},
                  .max_positional = 1},
      .run = RunInspect};
  for (const Flag& flag : Settings()) {
    if (flag.name == "model") subcommand.command.flags.push_back(flag);
  }
  return subcommand;
}

}  // namespace altiplano::cli

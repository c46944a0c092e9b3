#include <cstdio>
#include <unordered_map>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/config.h"
#include "server/cli/load_model.h"
#include "server/cli/request_flags.h"

namespace altiplano::cli {

namespace {

struct Tokens {
  std::vector<TokenId> ids;
  std::vector<std::string> pieces;
};

StatusOr<Tokens> TokenizeHere(const ParsedFlags& flags, const std::string& text) {
  ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(flags.text("model")));
  bool chat = flags.boolean("chat");
  ASSIGN_OR_RETURN(TextModel model, LoadText(*checkpoint, chat ? flags.text("chat-format") : "none"));
  Tokens tokens;
  if (chat) {
    if (model.chat_format == nullptr) {
      return Status(Code::kFailedPrecondition, "the checkpoint has no chat template; choose one with --chat-format");
    }
    Conversation conversation;
    conversation.messages.push_back({.role = Role::kUser, .content = text, .tool_calls = {}, .tool_call_id = {}});
    ASSIGN_OR_RETURN(RenderedPrompt prompt, model.chat_format->Render(conversation, *model.tokenizer));
    tokens.ids = std::move(prompt.ids);
  } else {
    if (auto bos = model.tokenizer->bos(); bos && flags.boolean("bos")) tokens.ids.push_back(*bos);
    model.tokenizer->Encode(text, &tokens.ids);
  }
  for (TokenId id : tokens.ids) tokens.pieces.emplace_back(model.tokenizer->TokenBytes(id));
  return tokens;
}

StatusOr<Tokens> TokenizeThere(const ParsedFlags& flags, const std::string& text) {
  ASSIGN_OR_RETURN(auto client, ConnectTo(flags));
  v1::TokenizeRequest request;
  request.set_omit_bos(!flags.boolean("bos"));
  if (flags.boolean("chat")) {
    auto* message = request.mutable_chat()->add_messages();
    message->set_role(v1::ROLE_USER);
    message->set_content(text);
  } else {
    request.set_text(text);
  }
  ASSIGN_OR_RETURN(v1::TokenizeResponse response, client->Tokenize(request));
  Tokens tokens;
  std::unordered_map<uint32_t, std::string> pieces;  // a call each
  for (uint32_t id : response.token_ids()) {
    auto [piece, is_new] = pieces.try_emplace(id);
    if (is_new) {
      v1::DetokenizeRequest one;
      one.add_token_ids(id);
      one.set_keep_special_tokens(true);
      ASSIGN_OR_RETURN(v1::DetokenizeResponse answer, client->Detokenize(one));
      piece->second = answer.text();
    }
    tokens.ids.push_back(static_cast<TokenId>(id));
    tokens.pieces.push_back(piece->second);
  }
  return tokens;
}

// A piece on one line: JSON's escapes, and \xNN for bytes that are no UTF-8 on their own.
std::string Quoted(const std::string& piece) {
  if (IsValidUtf8(piece)) return Json(piece).dump();
  std::string out = "\"";
  for (char c : piece) {
    auto byte = static_cast<unsigned char>(c);
    out += byte >= 0x20 && byte < 0x7F && c != '"' && c != '\\' ? std::string(1, c) : StrFormat("\\x%02x", byte);
  }
  return out + '"';
}

int RunTokenize(const ParsedFlags& flags) {
  if (flags.given("model") == flags.given("url")) {
    return Fail("tokenize", "needs one of --model (loads only the tokenizer) and --url (asks a server)", kExitUsage);
  }
  if (Status status = CheckRemote(flags); flags.given("url") && !status.ok()) {
    return Fail("tokenize", status.message(), kExitUsage);
  }
  auto text = TextOrStdin(flags, "text");
  if (!text.ok()) return Fail("tokenize", text.status().message(), kExitUsage);
  bool here = flags.given("model");
  auto tokens = here ? TokenizeHere(flags, *text) : TokenizeThere(flags, *text);
  if (!tokens.ok() && here) return Fail("tokenize", tokens.status().message(), ExitCodeOfLoad(tokens.status()));
  if (!tokens.ok()) return FailCall("tokenize", tokens.status());
  if (flags.boolean("json")) {
    OrderedJson json = {{"count", tokens->ids.size()}, {"ids", tokens->ids}, {"pieces", tokens->pieces}};
    std::printf("%s\n", json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace).c_str());
    return kExitOk;
  }
  for (size_t i = 0; i < tokens->ids.size(); ++i) {
    std::printf("%d\t%s\n", tokens->ids[i], Quoted(tokens->pieces[i]).c_str());
  }
  return kExitOk;
}

}  // namespace

Subcommand TokenizeCommand() {
  Subcommand subcommand{
      .command =
          {.name = "tokenize",
           .summary = "the token ids and pieces that a text becomes",
           .synopsis = "altiplano tokenize --model MODEL --text 'Hello, world'",
           .notes =
               "Prints a line for each token: id, tab, piece. A piece that is no UTF-8 on its own is shown by its\n"
               "bytes, with --url or --json as U+FFFD.",
           .flags = {{.name = "text",
                      .type = FlagType::kText,
                      .meaning = "The text. Without it: all of stdin, less a last newline.",
                      .example = "'Hello, world'"},
                     {.name = "chat",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "The text is a user's message; show the whole rendered prompt."},
                     {.name = "bos",
                      .type = FlagType::kBool,
                      .default_value = "true",
                      .meaning = "Begin plain text with the model's BOS token, as prompts do."},
                     {.name = "json",
                      .type = FlagType::kBool,
                      .default_value = "false",
                      .meaning = "Print one JSON object: count, ids, pieces."},
                     UrlFlag()}},
      .run = RunTokenize};
  for (const Flag& flag : Settings()) {
    if (flag.name == "model" || flag.name == "chat-format") subcommand.command.flags.push_back(flag);
  }
  return subcommand;
}

}  // namespace altiplano::cli

// Renderings against those of the reference templates, run by Jinja2 with Hugging Face's settings.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "server/base/strings.h"
#include "tests/server/text/chat_testlib.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano::testing {
namespace {

std::string Replaced(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

int CountSpecials(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  return static_cast<int>(std::count_if(ids.begin(), ids.end(), [&](TokenId id) { return tokenizer.IsSpecial(id); }));
}

// Of our own conversations; the ids follow from the text because no content in them spells a special token.
TEST(ChatGoldenTest, RendersOurRows) {
  const auto rows = ReadPyJsonLines(SourcePath("tests/server/text/chat_rendered.jsonl"));
  ASSERT_GE(rows.size(), 30u);
  for (const PyValue& row : rows) {
    SCOPED_TRACE(TextOf(row, "id"));
    const auto prompt = Format(TextOf(row, "format"))->Render(FromContext(*row.Find("context")), *TinyTokenizer());
    if (row.Find("error") != nullptr) {
      EXPECT_EQ(prompt.status().code(), Code::kInvalidArgument);
      continue;
    }
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->text, TextOf(row, "text"));
    EXPECT_EQ(prompt->ids, EncodeWithSpecials(*TinyTokenizer(), TextOf(row, "text")));
  }
}

TEST(ChatGoldenTest, RendersTheTinyModelsConversations) {
  const auto rows = ReadPyJson(SourcePath("tests/data/tiny/goldens.json"));
  const auto jinja = ReadFileIfPresent(SourcePath("tests/data/tiny/chat_template.jinja"));
  const auto format = ChatFormat::FromTemplate(jinja.value()).value();
  int rendered = 0;
  for (const PyValue& row : rows.items) {
    if (row.Find("messages") == nullptr) continue;
    SCOPED_TRACE(TextOf(row, "id"));
    PyValue context;
    context.kind = PyValue::Kind::kDict;
    for (const char* key : {"messages", "tools"}) {
      if (row.Find(key) == nullptr) continue;
      context.keys.push_back(key);
      context.items.push_back(*row.Find(key));
    }
    const auto prompt = format->Render(FromContext(context), *TinyTokenizer());
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->text, TextOf(row, "rendered"));
    EXPECT_EQ(prompt->ids, IdsOf(row, "prompt_token_ids"));
    ++rendered;
  }
  EXPECT_GE(rendered, 25);
}

TEST(ChatGoldenTest, RendersTheReferenceRows) {
  const auto rows = ReadPyJsonLines(DataPath("templates/golden_render.jsonl"));
  if (rows.empty() || Llama3OrNull() == nullptr) GTEST_SKIP() << "no shared test data";
  const Tokenizer& tokenizer = *Llama3OrNull();
  int equal = 0, errors = 0;
  for (const PyValue& row : rows) {
    const std::string& id = TextOf(row, "id");
    SCOPED_TRACE(id);
    const auto jinja = ReadFileIfPresent(DataPath(StrCat("templates/", TextOf(row, "template"))));
    const auto format = ChatFormat::FromTemplate(jinja.value());
    ASSERT_TRUE(format.ok()) << format.status().ToString();
    const auto prompt = (*format)->Render(FromContext(*row.Find("context")), tokenizer);
    if (row.Find("error") != nullptr) {
      EXPECT_EQ(prompt.status().code(), Code::kInvalidArgument);
      ASSERT_NE(prompt.status().detail(), nullptr);
      EXPECT_EQ(prompt.status().detail()->field_violations.size(), 1u);
      ++errors;
      continue;
    }
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    if (id.ends_with("/args_string_double_encoded")) {
      // The templates print arguments that are still a text as a JSON string, or letter by letter. We parse them.
      std::string expected = Replaced(TextOf(row, "text"), R"("{\"a\": 1}")", R"({"a": 1})");
      expected = Replaced(expected, R"([f({=, "=, a=, "=, :=,  =, 1=, }=)])", "[f(a=1)]");
      EXPECT_EQ(prompt->text, expected);
      EXPECT_EQ(prompt->ids, EncodeWithSpecials(tokenizer, expected));
      continue;
    }
    EXPECT_EQ(prompt->text, TextOf(row, "text"));
    if (id.ends_with("/special_in_content")) {
      // There the user's "<|eot_id|><|start_header_id|>system<|end_header_id|>" became three special tokens.
      EXPECT_EQ(CountSpecials(tokenizer, prompt->ids), CountSpecials(tokenizer, IdsOf(row, "ids")) - 3);
      EXPECT_EQ(Decode(tokenizer, prompt->ids), prompt->text);
      continue;
    }
    EXPECT_EQ(prompt->ids, IdsOf(row, "ids"));
    ++equal;
  }
  EXPECT_EQ(equal, 150 - 12 - 10);
  EXPECT_EQ(errors, 12);
}

TEST(ChatGoldenTest, RendersLlamaCppsGoldens) {
  for (const std::string_view model : {"3.1-8B", "3.2-3B"}) {
    for (const std::string_view context : {"simple", "system", "tool_use"}) {
      const auto golden = ReadFileIfPresent(
          DataPath(StrCat("templates/goldens/meta-llama-Llama-", model, "-Instruct-", context, ".txt")));
      if (!golden) GTEST_SKIP() << "no shared test data";
      SCOPED_TRACE(StrCat(model, " ", context));
      const Conversation chat =
          FromContext(ReadPyJson(DataPath(StrCat("templates/goldens/context-", context, ".json"))));
      const auto prompt = Format(StrCat("llama", model.substr(0, 3)))->Render(chat, *TinyTokenizer());
      ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
      EXPECT_EQ(Replaced(prompt->text, "<|begin_of_text|>", "<|startoftext|>"), *golden);
    }
  }
}

TEST(ChatGoldenTest, EncodesAsMetasChatFormat) {
  const auto rows = ReadPyJsonLines(DataPath("templates/golden_meta_chatformat.jsonl"));
  if (rows.empty() || Llama3OrNull() == nullptr) GTEST_SKIP() << "no shared test data";
  for (const PyValue& row : rows) {
    SCOPED_TRACE(TextOf(row, "id"));
    PyValue context;
    context.kind = PyValue::Kind::kDict;
    context.keys.push_back("messages");
    context.items.push_back(*row.Find("messages"));
    const auto prompt = Format("llama3-meta")->Render(FromContext(context), *Llama3OrNull());
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->ids, IdsOf(row, "ids"));
    EXPECT_EQ(Decode(*Llama3OrNull(), prompt->ids), prompt->text);
  }
}

// The conversation that a prompt in Meta's format is; nullopt for prompts that no conversation gives: those of base
// models, and Python lists after <|python_tag|>.
std::optional<Conversation> ConversationOf(std::string_view prompt) {
  constexpr std::string_view kHeader = "<|start_header_id|>", kHeaderEnd = "<|end_header_id|>\n\n";
  Conversation chat;
  prompt.remove_prefix(std::string_view("<|begin_of_text|>").size());
  while (prompt.starts_with(kHeader)) {
    prompt.remove_prefix(kHeader.size());
    const std::string role(prompt.substr(0, prompt.find(kHeaderEnd)));
    prompt.remove_prefix(role.size() + kHeaderEnd.size());
    if (prompt.empty()) return role == "assistant" ? std::optional(chat) : std::nullopt;
    const size_t end = std::min(prompt.find("<|eot_id|>"), prompt.find("<|eom_id|>"));
    const std::string content(prompt.substr(0, end));
    if (role == "assistant" && content.starts_with("<|python_tag|>")) {
      auto calls = ParseToolCalls(content);
      if (content.find(".call(") == std::string::npos) return std::nullopt;
      chat.builtin_tools = {calls.at(0).name};
      chat.messages.push_back(Calls(calls));
    } else {
      chat.messages.push_back(role == "system"    ? System(content)
                              : role == "user"    ? User(content)
                              : role == "ipython" ? Result(content)
                                                  : Assistant(content));
    }
    prompt.remove_prefix(end + 10);
  }
  return std::nullopt;
}

TEST(ChatGoldenTest, ExpressesMetasPromptExamples) {
  const auto rows = ReadPyJsonLines(DataPath("templates/meta_prompt_format_examples.jsonl"));
  if (rows.empty() || Llama3OrNull() == nullptr) GTEST_SKIP() << "no shared test data";
  int expressed = 0, not_expressible = 0;
  for (const PyValue& row : rows) {
    if (TextOf(row, "kind") != "prompt") continue;
    SCOPED_TRACE(StrCat(TextOf(row, "version"), " ", TextOf(row, "section")));
    const auto chat = ConversationOf(TextOf(row, "text"));
    if (!chat) {
      ++not_expressible;
      continue;
    }
    const auto prompt = Format("llama3-meta")->Render(*chat, *Llama3OrNull());
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->text, TextOf(row, "text"));
    if (prompt->text.find("<|end_header_id|>\n\n\n") == std::string::npos) {
      EXPECT_EQ(prompt->ids, IdsOf(row, "ids"));
    } else {  // the rows' ids are of the whole text; Meta's format encodes a header and its content apart
      EXPECT_EQ(Decode(*Llama3OrNull(), prompt->ids), prompt->text);
    }
    ++expressed;
  }
  EXPECT_EQ(not_expressible, 4);  // three base models, and one Python list after <|python_tag|>
  EXPECT_EQ(expressed, 18);
}

TEST(ChatGoldenTest, RendersLlamaGuardsPrompts) {
  const auto rows = ReadPyJsonLines(DataPath("guard/golden_prompts.jsonl"));
  if (rows.empty() || Llama3OrNull() == nullptr) GTEST_SKIP() << "no shared test data";
  for (const PyValue& row : rows) {
    const std::string& id = TextOf(row, "id");
    SCOPED_TRACE(id);
    Conversation chat;
    for (const PyValue& turn : row.Find("conversation")->items) {
      chat.messages.push_back(turn.items[0].text == "User" ? User(turn.items[1].text) : Assistant(turn.items[1].text));
    }
    const bool two = id.starts_with("llama_guard_2.");
    const auto format = Format(two                                        ? "llama-guard-2"
                               : id.starts_with("llama_guard_3_8b.stack") ? "llama-guard-3"
                                                                          : "llama-guard-3-cookbook");
    const auto prompt = format->Render(chat, *Llama3OrNull());
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    // Version 2's rows are texts to be tokenised with the beginning-of-text token in front.
    EXPECT_EQ(prompt->text, StrCat(two ? "<|begin_of_text|>" : "", TextOf(row, "prompt")));
    EXPECT_EQ(prompt->ids, two ? EncodeWithSpecials(*Llama3OrNull(), prompt->text) : IdsOf(row, "ids"));
  }
}

// Bytes and ChatML's markers only, for when SmolLM2's own vocabulary is not at hand.
std::shared_ptr<const Tokenizer> ByteChatMlTokenizer() {
  GgufVocabulary vocabulary = {.model = "gpt2", .pre = "smollm", .tokens = {}, .merges = {}, .types = {}};
  for (int b = 0; b < 256; ++b) {
    vocabulary.tokens.push_back(SpellBytes(std::string(1, static_cast<char>(b))));
    vocabulary.types.push_back(1);
  }
  for (const char* special : {"<|im_start|>", "<|im_end|>"}) {
    vocabulary.tokens.push_back(special);
    vocabulary.types.push_back(3);
  }
  return Tokenizer::FromGguf(vocabulary).value();
}

std::shared_ptr<const Tokenizer> SmolLm2OrNull() {
  const char* cache = std::getenv("ALTIPLANO_CACHE_DIR");
  const char* home = std::getenv("HOME");
  const std::string folder = cache != nullptr ? cache : StrCat(home != nullptr ? home : "", "/.cache/altiplano");
  const auto vocabulary = ReadGgufVocabulary(folder + "/SmolLM2-135M-Instruct.Q4_1.gguf");
  return vocabulary ? Tokenizer::FromGguf(*vocabulary).value() : nullptr;
}

TEST(ChatGoldenTest, RendersSmolLm2sConversations) {
  const auto file = ReadFileIfPresent(DataPath("goldens/smollm2-135m-instruct-q4_1.json"));
  if (!file) GTEST_SKIP() << "no shared test data";
  const auto own = SmolLm2OrNull(), bytes = ByteChatMlTokenizer();
  int rendered = 0;
  const PyValue rows = ParsePyJson(*file).value();
  for (const PyValue& row : rows.items) {
    if (row.Find("messages") == nullptr || row.Find("messages")->items.empty()) continue;
    SCOPED_TRACE(TextOf(row, "id"));
    PyValue context;
    context.kind = PyValue::Kind::kDict;
    context.keys.push_back("messages");
    context.items.push_back(*row.Find("messages"));
    const auto prompt = Format("smollm2")->Render(FromContext(context), own != nullptr ? *own : *bytes);
    ASSERT_TRUE(prompt.ok()) << prompt.status().ToString();
    EXPECT_EQ(prompt->text, TextOf(row, "rendered"));
    EXPECT_EQ(prompt->ids, own != nullptr ? IdsOf(row, "prompt_token_ids") : EncodeWithSpecials(*bytes, prompt->text));
    ++rendered;
  }
  EXPECT_EQ(rendered, 3);
}

}  // namespace
}  // namespace altiplano::testing

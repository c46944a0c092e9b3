// Tokenizer files that are wrong: each gives one error that says what and where.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "server/base/strings.h"
#include "server/text/tokenizer.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano {
namespace {

using testing::Encode;
using ::testing::HasSubstr;
using testing::SpellBytes;

std::vector<std::string> SmallRanks() {
  std::vector<std::string> ranks;
  for (int b = 0; b < 256; ++b) ranks.emplace_back(1, static_cast<char>(b));
  ranks.insert(ranks.end(), {"he", "ll", "hell", "hello"});
  return ranks;
}

std::string Base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    for (size_t j = 0; j < 3; ++j) bits = bits << 8 | (i + j < bytes.size() ? static_cast<uint8_t>(bytes[i + j]) : 0u);
    for (size_t j = 0; j < 4; ++j) out += i + j > bytes.size() ? '=' : kDigits[bits >> (18 - 6 * j) & 63];
  }
  return out;
}

std::string TiktokenFile(const std::vector<std::string>& ranks) {
  std::string file;
  for (size_t i = 0; i < ranks.size(); ++i) file += StrCat(Base64(ranks[i]), " ", i, "\n");
  return file;
}

void Replace(std::string* text, std::string_view from, std::string_view to) {
  const size_t at = text->find(from);
  ASSERT_NE(at, std::string::npos) << from;
  text->replace(at, from.size(), to);
}

TEST(Tiktoken, AcceptsTheSmallFile) {
  const auto tokenizer = Tokenizer::FromTiktoken(TiktokenFile(SmallRanks()));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  EXPECT_EQ(Encode(**tokenizer, "hello"), std::vector<TokenId>{259});
  EXPECT_EQ((*tokenizer)->Special("<|begin_of_text|>"), 260);
  std::string windows = TiktokenFile(SmallRanks());
  for (size_t at = 0; (at = windows.find('\n', at)) != std::string::npos; at += 2) windows.insert(at, "\r");
  EXPECT_TRUE(Tokenizer::FromTiktoken(windows).ok());
}

TEST(Tiktoken, MalformedFiles) {
  const struct {
    const char* name;
    std::function<void(std::string*)> break_it;
    const char* message;
  } kCases[] = {
      {"empty", [](std::string* f) { f->clear(); }, "no ranks: not a tiktoken file"},
      {"not tiktoken at all", [](std::string* f) { *f = "{\"version\": \"1.0\"}\n"; },
       "line 1: not base64: \"{\\x22version\\x22:\""},
      {"cut in the rank column", [](std::string* f) { f->resize(f->size() - 4); },
       "line 260: the rank is not a number: \"\""},
      {"cut in the token", [](std::string* f) { f->resize(f->size() - 7); }, "line 260: no \"base64 rank\" pair"},
      {"cut between lines", [](std::string* f) { f->resize(f->find(" 99\n") - 4); },
       "no token for the single byte 0x63"},
      {"bad base64", [](std::string* f) { Replace(f, "aGU= 256", "aG*= 256"); }, "line 257: not base64: \"aG*=\""},
      {"base64 with stray bits", [](std::string* f) { Replace(f, "aGU= 256", "aGV= 256"); },
       "line 257: not base64: \"aGV=\""},
      {"only padding", [](std::string* f) { Replace(f, "aGU= 256", "==== 256"); }, "line 257: not base64: \"====\""},
      {"no token", [](std::string* f) { Replace(f, "aGU= 256", " 256"); }, "line 257: not base64: \"\""},
      {"rank twice", [](std::string* f) { Replace(f, " 257", " 256"); },
       "line 258: token \"ll\": id 256 is taken by token \"he\""},
      {"token twice", [](std::string* f) { Replace(f, "bGw=", "aGU="); },
       "line 258: token \"he\": has two ids, 256 and 257"},
      {"rank missing", [](std::string* f) { Replace(f, " 259", " 260"); },
       "rank 259 is missing below the highest, 260"},
      {"huge rank", [](std::string* f) { Replace(f, " 259", " 99999999999"); },
       "line 260: token \"hello\": id 99999999999 is outside [0, 4194304)"},
      {"overflowing rank", [](std::string* f) { Replace(f, " 259", " 99999999999999999999"); },
       "line 260: the rank is not a number"},
      {"negative rank", [](std::string* f) { Replace(f, " 259", " -1"); }, "id -1 is outside"},
      {"text behind the rank", [](std::string* f) { Replace(f, " 259", " 259 x"); },
       "line 260: the rank is not a number: \"259 x\""},
      {"byte token missing", [](std::string* f) { Replace(f, "QQ== 65", "aGh6 65"); },
       "no token for the single byte 0x41"},
  };
  for (const auto& c : kCases) {
    std::string file = TiktokenFile(SmallRanks());
    c.break_it(&file);
    const auto made = Tokenizer::FromTiktoken(file);
    ASSERT_FALSE(made.ok()) << c.name;
    EXPECT_EQ(made.status().code(), Code::kInvalidArgument) << c.name;
    EXPECT_THAT(made.status().message(), HasSubstr(c.message)) << c.name;
  }
}

std::string SmallJson() {
  return testing::MakeTokenizerJson(SmallRanks(), {"<|bos|>", "<|eot|>"}, true);
}

// SmallJson with one change, by JSON pointer.
std::string With(const std::string& pointer, Json value) {
  Json file = ParseJson(SmallJson()).value();
  file[Json::json_pointer(pointer)] = std::move(value);
  return file.dump();
}

TEST(HuggingFace, AcceptsBothSpellingsOfMerges) {
  for (const bool pairs : {false, true}) {
    const auto made = Tokenizer::FromHuggingFace(testing::MakeTokenizerJson(SmallRanks(), {"<|bos|>"}, pairs));
    ASSERT_TRUE(made.ok()) << made.status().ToString();
    EXPECT_EQ(Encode(**made, "hello hell"), (std::vector<TokenId>{259, ' ', 258}));
    EXPECT_EQ((*made)->bos(), std::nullopt);
  }
}

TEST(HuggingFace, RecognisesPreTokenizersByTheirParts) {
  const Json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
  std::string wide = With("/pre_tokenizer", byte_level);
  EXPECT_EQ(Encode(**Tokenizer::FromHuggingFace(wide), "1 HE'LL"),
            Encode(**Tokenizer::FromHuggingFace(SmallJson()), "1 HE'LL"));
  const std::string single = With("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {digits, byte_level}}});
  EXPECT_TRUE(Tokenizer::FromHuggingFace(single).ok());
}

TEST(HuggingFace, Bos) {
  const Json templ = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<|bos|>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}}}}}},
      {"special_tokens", {{"<|bos|>", {{"id", "<|bos|>"}, {"ids", {260}}}}}}};
  EXPECT_EQ((*Tokenizer::FromHuggingFace(With("/post_processor", templ)))->bos(), 260);
  const Json sequence = {{"type", "Sequence"}, {"processors", {{{"type", "ByteLevel"}}, templ}}};
  EXPECT_EQ((*Tokenizer::FromHuggingFace(With("/post_processor", sequence)))->bos(), 260);
  Json wrong = templ;
  wrong["special_tokens"]["<|bos|>"]["ids"][0] = 4000;
  EXPECT_THAT(Tokenizer::FromHuggingFace(With("/post_processor", wrong)).status().message(), HasSubstr("no token"));
}

TEST(HuggingFace, AddedTokens) {
  const auto with = [](Json token) { return Tokenizer::FromHuggingFace(With("/added_tokens/2", std::move(token))); };
  // Not special: found in text as it stands.
  const auto plain = with({{"id", 262}, {"content", "<tool>"}, {"special", false}});
  ASSERT_TRUE(plain.ok()) << plain.status().ToString();
  EXPECT_EQ(Encode(**plain, "he<tool>he"), (std::vector<TokenId>{256, 262, 256}));
  EXPECT_FALSE((*plain)->IsSpecial(262));
  EXPECT_EQ((*plain)->Special("<tool>"), std::nullopt);
  // Spelled like a chat marker: special whatever the flag says.
  const auto marker = with({{"id", 262}, {"content", "<|im_end|>"}, {"special", false}});
  ASSERT_TRUE(marker.ok());
  EXPECT_TRUE((*marker)->IsSpecial(262));
  EXPECT_EQ(Encode(**marker, "<|im_end|>").size(), 10u);
  EXPECT_EQ((*marker)->Special("<|im_end|>"), 262);
  // A vocabulary entry that is declared special is one, and no text leads to it.
  const auto listed = with({{"id", 259}, {"content", "hello"}, {"special", true}});
  EXPECT_THAT(listed.status().message(), HasSubstr("merges[3]: the vocabulary has no text token \"hello\""));
}

TEST(HuggingFace, MalformedFiles) {
  const std::string good = SmallJson();
  const auto text = [&](std::string_view from, std::string_view to) {
    std::string file = good;
    Replace(&file, from, to);
    return file;
  };
  const struct {
    const char* name;
    std::string file;
    Code code;
    const char* message;
  } kCases[] = {
      {"empty", "", Code::kInvalidArgument, "the text ends where '{' should be (byte 0)"},
      {"not an object", "[]", Code::kInvalidArgument, "'{' expected"},
      {"truncated in a string", good.substr(0, good.find("Isolated") + 3), Code::kInvalidArgument,
       "the text ends inside a string"},
      {"truncated in merges", good.substr(0, good.size() - 9), Code::kInvalidArgument, "not valid JSON: the text ends"},
      {"trailing text", good + "x", Code::kInvalidArgument, "text after the end"},
      {"invalid UTF-8", text("Isolated", "Iso\xfflated"), Code::kInvalidArgument, "not UTF-8"},
      {"too deep", "{\"x\":" + std::string(100, '[') + std::string(100, ']') + "}", Code::kInvalidArgument,
       "nested deeper than 64 levels"},
      {"no vocab", "{}", Code::kInvalidArgument, "model.vocab is missing"},
      {"no merges", R"({"model":{"vocab":{}}})", Code::kInvalidArgument, "model.merges is missing"},
      {"vocab twice", text("\"vocab\":{", "\"vocab\":{},\"vocab\":{"), Code::kInvalidArgument, "given twice"},
      {"member twice", text("\"decoder\":{", "\"decoder\":null,\"decoder\":{"), Code::kInvalidArgument,
       "duplicate key \"decoder\""},
      {"vocab is an array", With("/model/vocab", Json::array()), Code::kInvalidArgument,
       "model.vocab: not valid JSON: '{' expected"},
      {"id is a string", text("\"hello\":259", "\"hello\":\"259\""), Code::kInvalidArgument,
       "model.vocab: not valid JSON: an integer expected"},
      {"id is a fraction", text("\"hello\":259", "\"hello\":259.0"), Code::kInvalidArgument, "an integer expected"},
      {"huge id", text("\"hello\":259", "\"hello\":99999999999"), Code::kInvalidArgument,
       "token \"hello\": id 99999999999 is outside [0, 4194304)"},
      {"overflowing id", text("\"hello\":259", "\"hello\":99999999999999999999"), Code::kInvalidArgument,
       "number too large"},
      {"negative id", text("\"hello\":259", "\"hello\":-1"), Code::kInvalidArgument, "id -1 is outside"},
      {"id twice", text("\"hello\":259", "\"hello\":258"), Code::kInvalidArgument,
       "token \"hello\": id 258 is taken by token \"hell\""},
      {"token twice", text("\"hello\":259", "\"hell\":259"), Code::kInvalidArgument,
       "token \"hell\": has two ids, 258 and 259"},
      {"escaped half surrogate", text("\"hello\":259", "\"\\ud800\":259"), Code::kInvalidArgument,
       "half a surrogate pair"},
      {"byte token missing", text("\"A\":65", "\"AAAA\":65"), Code::kInvalidArgument,
       "no token for the single byte 0x41"},
      {"merges is an object", With("/model/merges", Json::object()), Code::kInvalidArgument,
       "model.merges: not valid JSON: '[' expected"},
      {"merge of one", With("/model/merges/0", {"h"}), Code::kInvalidArgument,
       "model.merges: not valid JSON: ',' expected"},
      {"merge of a number", With("/model/merges/0", 5), Code::kInvalidArgument,
       "model.merges: not valid JSON: '\"' expected"},
      {"merge of three words", With("/model/merges/0", "h e l"), Code::kInvalidArgument,
       "merges[0]: \"h e l\" is not \"left right\""},
      {"merge into nothing", With("/model/merges/0", {"h", "h"}), Code::kInvalidArgument,
       "model.merges[0]: the vocabulary has no text token \"hh\""},
      {"merge of no token", With("/model/merges/0", {"zz", "h"}), Code::kInvalidArgument,
       "merges[0]: the vocabulary has no text token \"zz\""},
      {"merge not in bytes", With("/model/merges/0", {"字", "h"}), Code::kInvalidArgument,
       "merges[0]: \"\\xe5\\xad\\x97\" is not spelled in bytes"},
      {"merge twice", With("/model/merges/1", {"h", "e"}), Code::kInvalidArgument,
       "merges[1]: \"h\" + \"e\" is listed twice"},
      {"added token without id", With("/added_tokens/0", {{"content", "x"}}), Code::kInvalidArgument,
       "added_tokens[0] has no integer id"},
      {"added token without text", With("/added_tokens/1/content", nullptr), Code::kInvalidArgument,
       "added_tokens[1] has no content"},
      {"added token with huge id", With("/added_tokens/1/id", 1e30), Code::kInvalidArgument,
       "added_tokens[1] has no integer id"},
      {"added tokens share an id", With("/added_tokens/1/id", 260), Code::kInvalidArgument,
       "token \"<|eot|>\": id 260 is taken by token \"<|bos|>\""},
      {"added token elsewhere in vocab",
       With("/added_tokens/1", {{"id", 500}, {"content", "hello"}, {"special", true}}), Code::kInvalidArgument,
       "special token \"hello\" has id 500, but 259 in model.vocab"},
      {"added tokens is a string", With("/added_tokens", "x"), Code::kInvalidArgument, "added_tokens is not an array"},
      {"added token with lstrip",
       With("/added_tokens/1", {{"id", 261}, {"content", "<x>"}, {"special", false}, {"lstrip", true}}),
       Code::kUnimplemented, "\"<x>\" with lstrip is not supported"},
      {"special is a string", With("/added_tokens/1/special", "yes"), Code::kInvalidArgument,
       "special is a string, must be true or false"},
      {"ignore_merges is a number", With("/model/ignore_merges", 1), Code::kInvalidArgument,
       "ignore_merges is a number, must be true or false"},
      {"other model", With("/model/type", "Unigram"), Code::kUnimplemented, "model.type \"Unigram\" is not supported"},
      {"byte fallback", With("/model/byte_fallback", true), Code::kUnimplemented,
       "byte_fallback true is not supported"},
      {"subword prefix", With("/model/continuing_subword_prefix", "##"), Code::kUnimplemented,
       "continuing_subword_prefix \"##\""},
      {"dropout", With("/model/dropout", 0.1), Code::kUnimplemented, "model.dropout"},
      {"normalizer", With("/normalizer", {{"type", "NFC"}}), Code::kUnimplemented,
       "normalizer \"NFC\" is not supported"},
      {"other decoder", With("/decoder", {{"type", "Metaspace"}}), Code::kUnimplemented, "decoder \"Metaspace\""},
      {"no pre-tokenizer", With("/pre_tokenizer", nullptr), Code::kUnimplemented,
       "pre_tokenizer null is not supported"},
      {"pre-tokenizer of one step", With("/pre_tokenizer", {{"type", "Digits"}, {"individual_digits", true}}),
       Code::kUnimplemented, "pre_tokenizer Digits as a sequence is not supported"},
      {"other pre-tokenizer", With("/pre_tokenizer", {{"type", "Metaspace"}}), Code::kUnimplemented,
       "pre_tokenizer \"Metaspace\" is not supported"},
      {"other split", With("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\p{N}"), Code::kUnimplemented,
       "Split by \"\\x5cp{N}\" is not supported"},
      {"other behavior", With("/pre_tokenizer/pretokenizers/0/behavior", "Removed"), Code::kUnimplemented,
       "behavior \"Removed\""},
      {"prefix space", With("/pre_tokenizer/pretokenizers/1/add_prefix_space", true), Code::kUnimplemented,
       "add_prefix_space is not supported"},
      {"split twice", With("/pre_tokenizer/pretokenizers/1/use_regex", true), Code::kUnimplemented,
       "pre_tokenizer Split Gpt2"},
      {"pre-tokenizer without type", With("/pre_tokenizer", Json::object()), Code::kInvalidArgument,
       "pre_tokenizer has no type"},
      {"sequence without list", With("/pre_tokenizer/pretokenizers", 3), Code::kInvalidArgument,
       "pre_tokenizer.pretokenizers is not an array"},
      {"other post-processor", With("/post_processor", {{"type", "BertProcessing"}}), Code::kUnimplemented,
       "post_processor \"BertProcessing\""},
  };
  for (const auto& c : kCases) {
    const auto made = Tokenizer::FromHuggingFace(c.file);
    ASSERT_FALSE(made.ok()) << c.name;
    EXPECT_EQ(made.status().code(), c.code) << c.name << ": " << made.status().ToString();
    EXPECT_THAT(made.status().message(), HasSubstr(c.message)) << c.name;
  }
}

TEST(HuggingFace, EveryTruncationIsAnError) {
  const std::string good = SmallJson();
  for (size_t n = 0; n < good.size(); ++n) ASSERT_FALSE(Tokenizer::FromHuggingFace(good.substr(0, n)).ok()) << n;
}

GgufVocabulary SmallGguf() {
  GgufVocabulary gguf{
      .model = "gpt2", .pre = "smollm", .tokens = {}, .merges = {}, .types = {}, .bos = -1, .add_bos = false};
  for (const std::string& token : SmallRanks()) gguf.tokens.push_back(SpellBytes(token));
  gguf.tokens.insert(gguf.tokens.end(), {"<|im_start|>", "<tool>", "[PAD0]"});
  gguf.types.assign(SmallRanks().size(), 1);
  gguf.types.insert(gguf.types.end(), {3, 4, 5});
  gguf.merges = {"h e", "l l", "he ll", "hell o"};
  return gguf;
}

TEST(Gguf, AcceptsTheSmallVocabulary) {
  const auto made = Tokenizer::FromGguf(SmallGguf());
  ASSERT_TRUE(made.ok()) << made.status().ToString();
  EXPECT_EQ(Encode(**made, "hello<tool>"), (std::vector<TokenId>{259, 261}));
  EXPECT_EQ((*made)->Special("<|im_start|>"), 260);
  EXPECT_EQ((*made)->TokenBytes(262), "[PAD0]");
  EXPECT_EQ(Encode(**made, "[PAD0]").size(), 6u);
}

TEST(Gguf, MalformedVocabularies) {
  const struct {
    const char* name;
    std::function<void(GgufVocabulary*)> break_it;
    Code code;
    const char* message;
  } kCases[] = {
      {"SentencePiece", [](GgufVocabulary* g) { g->model = "llama"; }, Code::kUnimplemented,
       "tokenizer.ggml.model is \"llama\""},
      {"other split", [](GgufVocabulary* g) { g->pre = "qwen2"; }, Code::kUnimplemented,
       "tokenizer.ggml.pre is \"qwen2\""},
      {"no split named", [](GgufVocabulary* g) { g->pre = ""; }, Code::kUnimplemented, "tokenizer.ggml.pre is \"\""},
      {"types short", [](GgufVocabulary* g) { g->types.pop_back(); }, Code::kInvalidArgument,
       "token_type has 262 entries for 263 tokens"},
      {"unknown type", [](GgufVocabulary* g) { g->types[3] = 9; }, Code::kInvalidArgument, "has the unknown type 9"},
      {"token twice", [](GgufVocabulary* g) { g->tokens[257] = "he"; }, Code::kInvalidArgument,
       "token \"he\": has two ids, 256 and 257"},
      {"empty token", [](GgufVocabulary* g) { g->tokens[257] = ""; }, Code::kInvalidArgument, "id 257 has no bytes"},
      {"no tokens", [](GgufVocabulary* g) { g->tokens.clear(), g->types.clear(), g->merges.clear(); },
       Code::kInvalidArgument, "no token for the single byte 0x20"},
      {"merge of one", [](GgufVocabulary* g) { g->merges[1] = "ll"; }, Code::kInvalidArgument,
       "merges[1]: \"ll\" is not \"left right\""},
      {"merge to a special", [](GgufVocabulary* g) { g->types[259] = 3; }, Code::kInvalidArgument,
       "merges[3]: the vocabulary has no text token \"hello\""},
      {"bos outside", [](GgufVocabulary* g) { g->add_bos = true, g->bos = 999; }, Code::kInvalidArgument,
       "bos_token_id 999 is no token"},
  };
  for (const auto& c : kCases) {
    GgufVocabulary gguf = SmallGguf();
    c.break_it(&gguf);
    const auto made = Tokenizer::FromGguf(gguf);
    ASSERT_FALSE(made.ok()) << c.name;
    EXPECT_EQ(made.status().code(), c.code) << c.name << ": " << made.status().ToString();
    EXPECT_THAT(made.status().message(), HasSubstr(c.message)) << c.name;
  }
}

}  // namespace
}  // namespace altiplano

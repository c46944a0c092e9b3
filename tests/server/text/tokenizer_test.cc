#include "server/text/tokenizer.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "server/base/strings.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano {
namespace {

using testing::DataPath;
using testing::Decode;
using testing::Encode;
using testing::Llama3OrNull;
using testing::ReadFileIfPresent;
using testing::ReadJsonLines;
using testing::TinyTokenizer;
using Ids = std::vector<TokenId>;

#define SKIP_WITHOUT(tokenizer) \
  if (!(tokenizer)) GTEST_SKIP() << "no shared test data at " << ALTIPLANO_DATA_DIR

void ExpectGoldens(const Tokenizer& tokenizer, const std::string& path, size_t rows_expected) {
  const auto rows = ReadJsonLines(path);
  EXPECT_EQ(rows.size(), rows_expected);
  for (const Json& row : rows) {
    const auto text = row["text"].get<std::string>();
    const Ids ids = Encode(tokenizer, text);
    EXPECT_EQ(ids, row["ids"].get<Ids>()) << row.value("id", "") << " " << row["text"];
    EXPECT_EQ(Decode(tokenizer, ids), text);
  }
}

TEST(Llama3Tokenizer, GoldenTexts) {
  SKIP_WITHOUT(Llama3OrNull());
  ExpectGoldens(*Llama3OrNull(), DataPath("tokenizer/golden_encode.jsonl"), 498);
}

TEST(Llama3Tokenizer, LlamaCppVectors) {
  SKIP_WITHOUT(Llama3OrNull());
  const auto in = ReadFileIfPresent(DataPath("tokenizer/ggml-vocab-llama-bpe.gguf.inp"));
  const auto out = ReadFileIfPresent(DataPath("tokenizer/ggml-vocab-llama-bpe.gguf.out"));
  ASSERT_TRUE(in && out);
  constexpr std::string_view kSeparator = "\n__ggml_vocab_test__\n";
  std::string_view texts = *in, lines = *out;
  int count = 0;
  for (bool more = true; more; ++count) {  // a separator ends the file: the last text is empty, and so are its ids
    more = texts.find(kSeparator) != std::string_view::npos;
    const size_t end = std::min(texts.find(kSeparator), texts.size());
    const std::string_view line = lines.substr(0, lines.find('\n'));
    Ids expected;
    for (const char* p = line.data(); p < line.data() + line.size();) {
      char* next = nullptr;
      expected.push_back(static_cast<TokenId>(std::strtol(p, &next, 10)));
      for (p = next; p < line.data() + line.size() && *p == ' ';) ++p;
    }
    EXPECT_EQ(Encode(*Llama3OrNull(), texts.substr(0, end)), expected) << "vector " << count;
    texts.remove_prefix(std::min(end + kSeparator.size(), texts.size()));
    lines.remove_prefix(std::min(line.size() + 1, lines.size()));
  }
  EXPECT_EQ(count, 47);
}

// Ids that Hugging Face's tokenizer made of real chats: their text must give the same ids again.
TEST(Llama3Tokenizer, ShareGptIdsComeBack) {
  SKIP_WITHOUT(Llama3OrNull());
  const std::string path = DataPath("traces/sharegpt_llama31_8b_300_sps10.jsonl.gz");
  std::FILE* pipe = popen(StrCat("gzip -dc '", path, "' 2>/dev/null").c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string text;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
  if (pclose(pipe) != 0) GTEST_SKIP() << "cannot unpack " << path;
  int sequences = 0;
  for (std::string_view rest = text; !rest.empty();) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const Json row = ParseJson(rest.substr(0, end)).value();
    rest.remove_prefix(std::min(end + 1, rest.size()));
    for (const char* field : {"input_tok_ids", "output_tok_ids"}) {
      const auto ids = row[field].get<Ids>();
      EXPECT_EQ(Encode(*Llama3OrNull(), Decode(*Llama3OrNull(), ids)), ids) << "sequence " << sequences;
      ++sequences;
    }
  }
  EXPECT_EQ(sequences, 600);
}

TEST(Llama3Tokenizer, SpecialTokens) {
  const auto tokenizer = Llama3OrNull();
  SKIP_WITHOUT(tokenizer);
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  EXPECT_EQ(tokenizer->bos(), 128000);
  const auto table = ReadFileIfPresent(DataPath("tokenizer/special_tokens.tsv"));
  ASSERT_TRUE(table);
  std::istringstream lines(*table);
  std::string header;
  std::getline(lines, header);
  std::string id, name, meta_name;
  int count = 0;
  for (; lines >> id >> name >> meta_name; ++count) {
    EXPECT_EQ(tokenizer->Special(name), std::stoi(id));
    EXPECT_EQ(tokenizer->TokenBytes(std::stoi(id)), name);
    EXPECT_TRUE(tokenizer->IsSpecial(std::stoi(id)));
  }
  EXPECT_EQ(count, 256);
  EXPECT_EQ(tokenizer->Special("<|step_id|>"), 128005);  // Meta's later names
  EXPECT_EQ(tokenizer->Special("<|image|>"), 128011);
  EXPECT_EQ(tokenizer->Special("Hello"), std::nullopt);
  EXPECT_FALSE(tokenizer->IsSpecial(127999));
  EXPECT_FALSE(tokenizer->IsSpecial(128256));
}

TEST(Llama3Tokenizer, UserTextNeverBecomesASpecialToken) {
  const auto tokenizer = Llama3OrNull();
  SKIP_WITHOUT(tokenizer);
  EXPECT_EQ(Encode(*tokenizer, "<|eot_id|>"), (Ids{27, 91, 68, 354, 851, 91, 29}));
}

TEST(TinyTokenizer, UserTextNeverBecomesASpecialToken) {
  const auto tokenizer = TinyTokenizer();
  for (TokenId id = 0; id < tokenizer->vocab_size(); ++id) {
    for (const TokenId made : Encode(*tokenizer, tokenizer->TokenBytes(id))) ASSERT_FALSE(tokenizer->IsSpecial(made));
  }
}

// tokenizer.json and GGUF of the same vocabulary give the same ids as the tiktoken file. The files themselves are not
// at hand for Llama 3; their merges follow from the ranks.
TEST(Llama3Tokenizer, AllThreeFormatsAgree) {
  SKIP_WITHOUT(Llama3OrNull());
  const auto ranks = testing::TiktokenRanks(*ReadFileIfPresent(DataPath("tokenizer/tokenizer.model")));
  ASSERT_EQ(ranks.size(), 128000u);
  const auto merges = testing::ImpliedMerges(ranks);
  EXPECT_EQ(merges.size(), 280147u);  // as many as the published tokenizer.json has

  const std::vector<std::string> specials = {"<|begin_of_text|>", "<|end_of_text|>"};
  auto from_json = Tokenizer::FromHuggingFace(testing::MakeTokenizerJson(ranks, specials, false));
  ASSERT_TRUE(from_json.ok()) << from_json.status().ToString();
  ExpectGoldens(**from_json, DataPath("tokenizer/golden_encode.jsonl"), 498);
  EXPECT_EQ((*from_json)->Special("<|end_of_text|>"), 128001);

  GgufVocabulary gguf{
      .model = "gpt2", .pre = "llama-bpe", .tokens = {}, .merges = {}, .types = {}, .bos = 128000, .add_bos = true};
  for (const std::string& token : ranks) gguf.tokens.push_back(testing::SpellBytes(token)), gguf.types.push_back(1);
  for (const std::string& name : specials) gguf.tokens.push_back(name), gguf.types.push_back(3);
  for (const auto& [left, right] : merges) gguf.merges.push_back(left + " " + right);
  auto from_gguf = Tokenizer::FromGguf(gguf);
  ASSERT_TRUE(from_gguf.ok()) << from_gguf.status().ToString();
  ExpectGoldens(**from_gguf, DataPath("tokenizer/golden_encode.jsonl"), 498);
  EXPECT_EQ((*from_gguf)->bos(), 128000);
  EXPECT_TRUE((*from_gguf)->IsSpecial(128000));
}

TEST(TinyTokenizer, GoldenPrompts) {
  const auto tokenizer = TinyTokenizer();
  const auto goldens =
      ParseJson(ReadFileIfPresent(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny/goldens.json")).value());
  int count = 0;
  for (const Json& golden : goldens.value()) {
    if (!golden.contains("rendered")) continue;
    const auto text = golden["rendered"].get<std::string>();
    Ids ids;  // the rendered template: specials by name, text between them; plain text starts with BOS
    if (!golden.contains("messages")) ids.push_back(tokenizer->bos().value());
    for (size_t at = 0; at < text.size();) {
      const size_t marker = std::min(text.find("<|", at), text.size());
      tokenizer->Encode(std::string_view(text).substr(at, marker - at), &ids);
      if (marker == text.size()) break;
      at = text.find("|>", marker) + 2;
      const auto special = tokenizer->Special(std::string_view(text).substr(marker, at - marker));
      ASSERT_TRUE(special.has_value()) << text.substr(marker, at - marker);
      ids.push_back(*special);
    }
    EXPECT_EQ(ids, golden["prompt_token_ids"].get<Ids>()) << golden["id"];
    ++count;
  }
  EXPECT_EQ(count, 31);
  EXPECT_EQ(tokenizer->vocab_size(), 2048);
  EXPECT_EQ(tokenizer->bos(), 1792);
}

std::optional<GgufVocabulary> SmolLm2() {
  const char* cache = std::getenv("ALTIPLANO_CACHE_DIR");
  const char* home = std::getenv("HOME");
  const std::string folder = cache ? cache : StrCat(home ? home : "", "/.cache/altiplano");
  return testing::ReadGgufVocabulary(folder + "/SmolLM2-135M-Instruct.Q4_1.gguf");
}

TEST(SmolLm2Tokenizer, GoldenTexts) {
  const auto gguf = SmolLm2();
  if (!gguf) GTEST_SKIP() << "SmolLM2-135M-Instruct.Q4_1.gguf is not in the cache folder";
  const auto tokenizer = Tokenizer::FromGguf(*gguf);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  EXPECT_EQ((*tokenizer)->vocab_size(), 49152);
  EXPECT_EQ((*tokenizer)->bos(), std::nullopt);
  EXPECT_EQ((*tokenizer)->Special("<|im_start|>"), 1);
  EXPECT_EQ(Encode(**tokenizer, "<|im_start|>").size(), 7u);  // "<", "|", "im", "_", "start", "|", ">"
  const auto rows = ReadJsonLines(DataPath("tokenizer/golden_encode_smollm2.jsonl"));
  if (rows.empty()) GTEST_SKIP() << "no shared test data at " << ALTIPLANO_DATA_DIR;
  EXPECT_EQ(rows.size(), 498u);
  for (const Json& row : rows) {
    EXPECT_EQ(Encode(**tokenizer, row["text"].get<std::string>()), row["ids"].get<Ids>()) << row["text"];
  }
}

// One piece of a million characters: anything quadratic takes hours here and meets ctest's limit.
TEST(Tokenizer, HostileTextsOfAMegabyte) {
  std::vector<std::shared_ptr<const Tokenizer>> tokenizers = {TinyTokenizer()};
  if (Llama3OrNull()) tokenizers.push_back(Llama3OrNull());
  std::mt19937_64 random(1);
  for (const std::string_view unit : {"a", " ", "7", "\u0301", "\n", "ab", "'", "\xff", " \n", "?"}) {
    std::string text;
    while (text.size() < 1'000'000) {
      if (unit == "?") {
        text += static_cast<char>('a' + random() % 26);
      } else {
        text += unit;
      }
    }
    for (const auto& tokenizer : tokenizers) {
      const Ids ids = Encode(*tokenizer, text);
      EXPECT_LT(ids.size(), text.size() + 1);
      EXPECT_EQ(Decode(*tokenizer, ids), text);
    }
  }
}

TEST(Tokenizer, EncodesUpToALength) {
  std::vector<std::shared_ptr<const Tokenizer>> tokenizers = {TinyTokenizer()};
  if (Llama3OrNull()) tokenizers.push_back(Llama3OrNull());
  const std::string text = "Snow fell on 12 hills, and <|eot_id|> on  none.\n\nWho saw it?";
  for (const auto& tokenizer : tokenizers) {
    const Ids all = Encode(*tokenizer, text);
    for (size_t most = 0; most <= all.size() + 1; ++most) {
      Ids ids;
      const bool whole = tokenizer->EncodeUpTo(most, text, &ids);
      EXPECT_EQ(whole, ids.size() == all.size()) << most;
      EXPECT_TRUE(whole || ids.size() > most) << most;
      EXPECT_TRUE(ids.size() <= all.size() && std::equal(ids.begin(), ids.end(), all.begin())) << most;
      EXPECT_TRUE(whole || most < all.size()) << most;
    }
    Ids first;
    EXPECT_FALSE(tokenizer->EncodeUpTo(0, text, &first));
    EXPECT_LT(first.size(), 5u);
  }
}

TEST(Tokenizer, AnyBytesSurvive) {
  std::mt19937_64 random(2);
  const auto tokenizer = TinyTokenizer();
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (size_t n = random() % 200; n > 0; --n) text += static_cast<char>(random() % (round % 2 ? 256 : 128));
    EXPECT_EQ(Decode(*tokenizer, Encode(*tokenizer, text)), text);
  }
}

}  // namespace
}  // namespace altiplano

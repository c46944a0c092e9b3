#include "server/text/incremental_decoder.h"

#include <gtest/gtest.h>

#include <random>

#include "server/base/strings.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano {
namespace {

// A tokenizer whose tokens are the single bytes and one special, 256: for feeding exact bytes.
class ByteTokens : public Tokenizer {
 public:
  void Encode(std::string_view text, std::vector<TokenId>* ids) const override {
    for (const char c : text) ids->push_back(static_cast<uint8_t>(c));
  }
  std::string_view TokenBytes(TokenId id) const override {
    if (id == 256) return "<|s|>";
    return id >= 0 && id < 256 ? std::string_view(bytes_).substr(static_cast<size_t>(id), 1) : std::string_view();
  }
  bool IsSpecial(TokenId id) const override { return id == 256; }
  std::optional<TokenId> Special(std::string_view) const override { return std::nullopt; }
  int32_t vocab_size() const override { return 257; }
  std::optional<TokenId> bos() const override { return std::nullopt; }

 private:
  const std::string bytes_ = [] {
    std::string all;
    for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
    return all;
  }();
};

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

TEST(IncrementalDecoder, HoldsBackUntilACodePointIsWhole) {
  IncrementalDecoder decoder(std::make_shared<ByteTokens>(), false);
  EXPECT_EQ(decoder.Push(0xF0), "");
  EXPECT_EQ(decoder.Push(0x9F), "");
  EXPECT_EQ(decoder.Push(0x98), "");
  EXPECT_EQ(decoder.Push(0x80), "\U0001f600");
  EXPECT_EQ(decoder.Push(0xE2), "");
  EXPECT_EQ(decoder.Push('a'), "\ufffda");  // it can no longer become one
  EXPECT_EQ(decoder.Push(0xE2), "");
  EXPECT_EQ(decoder.Push(0x82), "");
  EXPECT_EQ(decoder.Flush(), "\ufffd");
  EXPECT_EQ(decoder.Flush(), "");
}

TEST(IncrementalDecoder, SpecialTokensAreNamesOrNothing) {
  const auto tokenizer = std::make_shared<ByteTokens>();
  IncrementalDecoder without(tokenizer, false), with(tokenizer, true);
  EXPECT_EQ(without.Push(0xC3), "");
  EXPECT_EQ(without.Push(256), "");
  EXPECT_EQ(without.Push(0xA9), "\u00e9");
  EXPECT_EQ(with.Push(0xC3), "");
  EXPECT_EQ(with.Push(256), "\ufffd<|s|>");
  EXPECT_EQ(with.Push(5000), "");  // outside the vocabulary
}

TEST(IncrementalDecoder, GoldenValidity) {
  const auto rows = testing::ReadJsonLines(testing::DataPath("unicode/utf8_validity.jsonl"));
  if (rows.empty()) GTEST_SKIP() << "no shared test data at " << ALTIPLANO_DATA_DIR;
  EXPECT_EQ(rows.size(), 203u);
  const auto tokenizer = std::make_shared<ByteTokens>();
  for (const Json& row : rows) {
    const std::string bytes = FromHex(row["hex"]);
    IncrementalDecoder decoder(tokenizer, false);
    std::string text;
    for (const char c : bytes) {
      text += decoder.Push(static_cast<uint8_t>(c));
      EXPECT_TRUE(IsValidUtf8(text));
    }
    text += decoder.Flush();
    EXPECT_EQ(text, row["replace"].get<std::string>()) << row["hex"];
    EXPECT_EQ(text == bytes, row["valid"].get<bool>() || bytes == row["replace"].get<std::string>()) << row["hex"];
  }
}

TEST(IncrementalDecoder, GoldenStreams) {
  const auto rows = testing::ReadJsonLines(testing::DataPath("tokenizer/golden_stream_decode.jsonl"));
  const auto tokenizer = testing::Llama3OrNull();
  if (rows.empty() || !tokenizer) GTEST_SKIP() << "no shared test data at " << ALTIPLANO_DATA_DIR;
  EXPECT_GT(rows.size(), 50u);
  for (const Json& row : rows) {
    IncrementalDecoder decoder(tokenizer, true);
    for (size_t i = 0; i < row["ids"].size(); ++i) {
      EXPECT_EQ(decoder.Push(row["ids"][i].get<TokenId>()), row["chunks"][i].get<std::string>())
          << row["id"] << " token " << i;
    }
    EXPECT_EQ(decoder.Flush(), row["flush"].get<std::string>()) << row["id"];
  }
}

// Whatever the bytes and however they are cut: chunks are valid UTF-8 and their sum does not depend on the cuts.
TEST(IncrementalDecoder, CutsDoNotShow) {
  const auto tiny = testing::TinyTokenizer();
  const auto bytewise = std::make_shared<ByteTokens>();
  std::mt19937_64 random(5);
  for (int round = 0; round < 2000; ++round) {
    IncrementalDecoder by_token(tiny, false), by_byte(bytewise, false);
    std::string whole, single;
    for (size_t n = random() % 30; n > 0; --n) {
      const auto id = static_cast<TokenId>(random() % (random() % 2 ? 256 : 1792));
      const std::string chunk = by_token.Push(id);
      ASSERT_TRUE(IsValidUtf8(chunk));
      whole += chunk;
      for (const char c : tiny->TokenBytes(id)) single += by_byte.Push(static_cast<uint8_t>(c));
      ASSERT_EQ(whole, single);
    }
    ASSERT_EQ(whole + by_token.Flush(), single + by_byte.Flush());
  }
}

}  // namespace
}  // namespace altiplano

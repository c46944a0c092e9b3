// Merging against a slow oracle, and the tables beneath it.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "server/base/strings.h"
#include "server/text/bpe_merge.h"
#include "server/text/bpe_tokenizer.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano {
namespace {

using testing::Decode;
using testing::Encode;

std::string Byte(int b) {
  return std::string(1, static_cast<char>(b));
}

// A made-up vocabulary: 256 bytes, then random concatenations of two earlier tokens.
struct RandomVocabulary {
  std::vector<std::string> tokens;
  std::vector<std::pair<size_t, size_t>> merges;  // token 256 + i is made of these two

  RandomVocabulary(std::mt19937_64& random, size_t count, int letters) {
    std::set<std::string> seen;
    for (int b = 0; b < 256; ++b) seen.insert(tokens.emplace_back(Byte(b)));
    const auto pick = [&]() -> size_t {
      if (tokens.size() > 256 && random() % 2) return 256 + random() % (tokens.size() - 256);
      return 'a' + random() % static_cast<unsigned>(letters);
    };
    while (tokens.size() < 256 + count) {
      const size_t left = pick(), right = pick();
      if (!seen.insert(tokens[left] + tokens[right]).second) continue;
      tokens.push_back(tokens[left] + tokens[right]);
      merges.emplace_back(left, right);
    }
  }

  BpeTables Tables(bool with_merges, bool whole_pieces_first) const {
    BpeTables tables;
    tables.whole_pieces_first = whole_pieces_first;
    for (size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_TRUE(tables.vocabulary.Add(static_cast<int64_t>(i), tokens[i], BpeVocabulary::Kind::kText).ok());
    }
    if (with_merges) {
      tables.merges.emplace(merges.size());
      for (uint32_t i = 0; i < merges.size(); ++i) {
        EXPECT_TRUE(tables.merges->Add(static_cast<TokenId>(merges[i].first), static_cast<TokenId>(merges[i].second),
                                       {i, static_cast<TokenId>(256 + i)}));
      }
    }
    return tables;
  }
};

// The definition, step by step. `rank_of` gives the rank and the token of a pair of tokens, or -1.
template <typename RankOf>
std::vector<TokenId> SlowMerge(std::string_view piece, const RankOf& rank_of) {
  std::vector<TokenId> parts;
  for (const char c : piece) parts.push_back(static_cast<uint8_t>(c));
  for (;;) {
    int64_t best_rank = -1;
    size_t best = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const int64_t rank = rank_of(parts[i], parts[i + 1]);
      if (rank >= 0 && (best_rank < 0 || rank < best_rank)) best_rank = rank, best = i;
    }
    if (best_rank < 0) return parts;
    parts[best] = static_cast<TokenId>(256 + best_rank);
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(BpeMerge, EqualsTheDefinitionAtEveryLength) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 60; ++round) {
    const int letters = 1 + static_cast<int>(random() % 4);
    const RandomVocabulary made(random, 5 + random() % 60, letters);
    const auto by_bytes = BpeTokenizer::Make(made.Tables(false, false)).value();
    const auto by_merges = BpeTokenizer::Make(made.Tables(true, false)).value();
    std::map<std::string, int64_t> rank_of_bytes;
    std::map<std::pair<size_t, size_t>, int64_t> rank_of_pair;
    for (size_t i = 0; i < made.merges.size(); ++i) {
      rank_of_bytes[made.tokens[256 + i]] = rank_of_pair[made.merges[i]] = static_cast<int64_t>(i);
    }
    const auto token = [&](TokenId id) { return made.tokens[static_cast<size_t>(id)]; };
    for (int i = 0; i < 60; ++i) {
      std::string piece;  // letters only: one piece for the split; lengths on both sides of kMaxShortPiece
      for (size_t n = 1 + random() % (i % 2 ? 12 : 3 * kMaxShortPiece); n > 0; --n) {
        piece += static_cast<char>('a' + random() % static_cast<unsigned>(letters));
      }
      ASSERT_EQ(Encode(*by_bytes, piece), SlowMerge(piece,
                                                    [&](TokenId left, TokenId right) {
                                                      const auto it = rank_of_bytes.find(token(left) + token(right));
                                                      return it == rank_of_bytes.end() ? -1 : it->second;
                                                    }))
          << piece;
      ASSERT_EQ(Encode(*by_merges, piece),
                SlowMerge(piece,
                          [&](TokenId left, TokenId right) {
                            const auto it = rank_of_pair.find({static_cast<size_t>(left), static_cast<size_t>(right)});
                            return it == rank_of_pair.end() ? -1 : it->second;
                          }))
          << piece;
    }
  }
}

TEST(BpeMerge, BytesWithoutATokenVanishAndTheirNeighboursMeet) {
  BpeTables tables;
  tables.whole_pieces_first = false;
  for (int b = 0; b < 256; ++b) {
    if (b == '\x04') continue;
    ASSERT_TRUE(tables.vocabulary.Add(b, Byte(b), BpeVocabulary::Kind::kText).ok());
  }
  ASSERT_TRUE(tables.vocabulary.Add(300, "!?", BpeVocabulary::Kind::kText).ok());
  tables.merges.emplace(1);
  ASSERT_TRUE(tables.merges->Add('!', '?', {0, 300}));
  const auto tokenizer = BpeTokenizer::Make(std::move(tables)).value();
  EXPECT_EQ(Encode(*tokenizer, "!\x04?"), std::vector<TokenId>{300});
  EXPECT_EQ(Encode(*tokenizer, std::string(1000, '\x04')), std::vector<TokenId>{});
  EXPECT_EQ(tokenizer->TokenBytes(299), "");
  EXPECT_EQ(tokenizer->TokenBytes(301), "");
  EXPECT_EQ(tokenizer->TokenBytes(-1), "");
}

TEST(BpeTokenizer, TokensThatMergesDoNotReachNeedTheWholePieceRule) {
  std::mt19937_64 random(3);
  RandomVocabulary made(random, 1, 1);  // 256 is "aa"
  made.tokens.push_back("aaa");         // 257: no merge leads here
  EXPECT_EQ(Encode(*BpeTokenizer::Make(made.Tables(true, true)).value(), "aaa"), std::vector<TokenId>{257});
  EXPECT_EQ(Encode(*BpeTokenizer::Make(made.Tables(true, false)).value(), "aaa"), (std::vector<TokenId>{256, 'a'}));
}

TEST(BpeTokenizer, VerbatimTokensAreFoundLeftmostThenLongest) {
  std::mt19937_64 random(3);
  const RandomVocabulary made(random, 1, 1);
  BpeTables tables = made.Tables(true, true);
  for (const auto& [id, text] : {std::pair{300, "<t>"}, {301, "<t>s"}, {302, ">s<"}}) {
    ASSERT_TRUE(tables.vocabulary.Add(id, text, BpeVocabulary::Kind::kDecode).ok());
    tables.verbatim.push_back(id);
  }
  const auto tokenizer = BpeTokenizer::Make(std::move(tables)).value();
  EXPECT_EQ(Encode(*tokenizer, "a<t>s<t>x<"), (std::vector<TokenId>{'a', 301, 300, 'x', '<'}));
  EXPECT_FALSE(tokenizer->IsSpecial(300));
  EXPECT_EQ(tokenizer->Special("<t>"), std::nullopt);
}

TEST(BpeVocabulary, RefusesWhatCannotBe) {
  using Kind = BpeVocabulary::Kind;
  BpeVocabulary vocabulary(0);
  ASSERT_TRUE(vocabulary.Add(5, "ab", Kind::kText).ok());
  EXPECT_EQ(vocabulary.Add(5, "cd", Kind::kText).message(), "token \"cd\": id 5 is taken by token \"ab\"");
  EXPECT_EQ(vocabulary.Add(6, "ab", Kind::kText).message(), "token \"ab\": has two ids, 5 and 6");
  EXPECT_TRUE(vocabulary.Add(6, "ab", Kind::kSpecial).ok());  // of the same name, but never from text
  EXPECT_EQ(vocabulary.Find("ab"), 5);
  EXPECT_EQ(vocabulary.Add(7, "", Kind::kText).message(), "token \"\": id 7 has no bytes");
  EXPECT_EQ(vocabulary.Add(-1, "x", Kind::kText).message(), "token \"x\": id -1 is outside [0, 4194304)");
  EXPECT_EQ(vocabulary.Add(int64_t{1} << 40, "x", Kind::kText).code(), Code::kInvalidArgument);
}

TEST(BpeVocabulary, FindsEverythingAfterGrowing) {
  BpeVocabulary vocabulary(0);
  const auto name = [](int i) { return std::string(static_cast<size_t>(i % 40), 'x') + std::to_string(i); };
  for (int i = 0; i < 20'000; ++i) ASSERT_TRUE(vocabulary.Add(i, name(i), BpeVocabulary::Kind::kText).ok());
  for (int i = 0; i < 20'000; ++i) ASSERT_EQ(vocabulary.Find(name(i)), i);
  EXPECT_EQ(vocabulary.Find("x-1"), -1);
  EXPECT_EQ(vocabulary.Find(""), -1);
}

TEST(SpelledBytes, AllBytesThereAndBack) {
  std::string all;
  for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
  std::string bytes;
  ASSERT_TRUE(AppendSpelledBytes(testing::SpellBytes(all), &bytes));
  EXPECT_EQ(bytes, all);
  for (const std::string_view bad : {"a b", "\u0144", "\u00ad", "\n", "字", "\xc4", "\xff"}) {
    EXPECT_FALSE(AppendSpelledBytes(bad, &bytes)) << bad;
  }
}

}  // namespace
}  // namespace altiplano

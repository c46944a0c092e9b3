#include "server/text/split.h"

#include <gtest/gtest.h>

#include <random>
#include <sstream>

#include "server/base/strings.h"
#include "server/text/unicode.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano {
namespace {

using testing::SplitByRegex;
using Pieces = std::vector<std::string>;

Pieces Split(SplitPattern pattern, std::string_view text) {
  Pieces pieces;
  while (!text.empty()) {
    const size_t length = FirstPiece(pattern, text);
    if (length == 0 || length > text.size()) {
      ADD_FAILURE() << "piece of " << length << " bytes in a text of " << text.size();
      break;
    }
    pieces.emplace_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return pieces;
}

TEST(Llama3Split, Examples) {
  const std::vector<std::pair<std::string, Pieces>> kCases = {
      {"Hello world", {"Hello", " world"}},
      {"it's IT'S we'LL'd 'x", {"it", "'s", " IT", "'S", " we", "'LL", "'d", " '", "x"}},
      {"a'\u017fb", {"a", "'\u017f", "b"}},  // long s folds to s
      {"1234567", {"123", "456", "7"}},
      {"\u0661\u0662\u0663\u0664", {"\u0661\u0662\u0663", "\u0664"}},  // Arabic digits count as code points
      {"a   b", {"a", "  ", " b"}},
      {"a   !", {"a", "  ", " !"}},
      {"a   1", {"a", "  ", " ", "1"}},
      {"a   ", {"a", "   "}},
      {"a \n \n  b", {"a", " \n \n", " ", " b"}},
      {"!!\r\n\r\nx", {"!!\r\n\r\n", "x"}},
      {"\tfoo", {"\tfoo"}},
      {"\nfoo", {"\n", "foo"}},
      {"\u00a0foo", {"\u00a0foo"}},
      {"\u00a0!", {"\u00a0", "!"}},
      {"e\u0301a", {"e", "\u0301a"}},  // a combining mark is no letter
      {"\x80z\xff\xfe", {"\x80z", "\xff\xfe"}},
  };
  for (const auto& [text, pieces] : kCases) EXPECT_EQ(Split(SplitPattern::kLlama3, text), pieces) << text;
}

TEST(Gpt2Split, Examples) {
  EXPECT_EQ(Split(SplitPattern::kGpt2, "it's IT'S 123  45\n\n x"),
            (Pieces{"it", "'s", " IT", "'", "S", " 123", " ", " 45", "\n\n", " x"}));
  // Single digits cut the text first: the blanks before one end a text of their own and stay together.
  EXPECT_EQ(Split(SplitPattern::kGpt2SingleDigits, "a  12 b"), (Pieces{"a", "  ", "1", "2", " b"}));
  EXPECT_EQ(Split(SplitPattern::kGpt2SingleDigits, "a 1"), (Pieces{"a", " ", "1"}));
}

// Random texts over characters that the rules treat differently, judged by the regular expression itself.
TEST(Split, EqualsTheRegularExpression) {
  const std::vector<std::string> kAlphabet = {"s",        "t",          "r",
                                              "e",        "v",          "l",
                                              "d",        "m",          "S",
                                              "L",        "x",          "\u017f",
                                              "\u00e9",   "字",         "1",
                                              "2",        "\u00b2",     "\u0665",
                                              "\u2167",   " ",          " ",
                                              "\t",       "\n",         "\r",
                                              "\u00a0",   "\u3000",     "\u0085",
                                              "\u200b",   "\u180e",     "'",
                                              "'",        "!",          "-",
                                              "\u0301",   "\U0001f600", "\x80",
                                              "\xe2\x82", "\xf0",       std::string(1, '\0')};
  std::mt19937_64 random(7);
  for (int round = 0; round < 60'000; ++round) {
    std::string text;
    const size_t distinct = 1 + random() % kAlphabet.size();  // few distinct: long runs
    const size_t base = random() % kAlphabet.size();
    for (size_t n = random() % 14; n > 0; --n) text += kAlphabet[(base + random() % distinct) % kAlphabet.size()];
    for (const auto pattern : {SplitPattern::kLlama3, SplitPattern::kGpt2, SplitPattern::kGpt2SingleDigits}) {
      ASSERT_EQ(Split(pattern, text), SplitByRegex(pattern, text))
          << static_cast<int>(pattern) << " " << Json(text).dump(-1, ' ', true, Json::error_handler_t::replace);
    }
  }
}

TEST(Split, EverythingSpelledInOneClassIsOnePiece) {
  const size_t n = 1 << 20;
  for (const std::string_view unit : {"a", " ", "\n", "!", "\u0301", "\x80"}) {
    std::string text;
    while (text.size() < n) text += unit;
    EXPECT_EQ(FirstPiece(SplitPattern::kLlama3, text), text.size())
        << Json(unit).dump(-1, ' ', true, Json::error_handler_t::replace);
  }
}

TEST(Unicode, TablesEqualIcu) {
  const auto file = testing::ReadFileIfPresent(testing::DataPath("unicode/ranges_L_N_WhiteSpace_unicode17.tsv"));
  if (!file) GTEST_SKIP() << "no shared test data at " << ALTIPLANO_DATA_DIR;
  std::vector<CharClass> expected(0x110000, CharClass::kOther);
  std::istringstream lines(*file);
  std::string name, first, last;
  std::getline(lines, name);
  int ranges = 0;
  while (lines >> name >> first >> last) {
    const CharClass cls = name == "L" ? CharClass::kLetter : name == "N" ? CharClass::kNumber : CharClass::kSpace;
    for (auto c = std::stoul(first, nullptr, 16); c <= std::stoul(last, nullptr, 16); ++c) expected[c] = cls;
    ++ranges;
  }
  EXPECT_GT(ranges, 500);
  for (char32_t c = 0; c < 0x110000; ++c) {
    ASSERT_EQ(static_cast<int>(ClassOf(c)), static_cast<int>(expected[c]))
        << StrFormat("U+%04X", static_cast<unsigned>(c));
  }
}

TEST(Unicode, Utf8AtTheEdgesOfTable37) {
  const auto decode = [](std::string_view text) { return DecodeUtf8(text); };
  EXPECT_EQ(decode("\x7f").code_point, 0x7Fu);
  EXPECT_EQ(decode("\xf4\x8f\xbf\xbf").code_point, 0x10FFFFu);
  EXPECT_EQ(decode("\xed\x9f\xbf").code_point, 0xD7FFu);
  for (const std::string_view bad :
       {"\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5", "\x80"}) {
    EXPECT_EQ(decode(bad).kind, Utf8Char::kInvalid);
    EXPECT_EQ(decode(bad).length, 1);
  }
  EXPECT_EQ(decode("\xf0\x9f\x98").kind, Utf8Char::kTruncated);
  EXPECT_EQ(decode("\xf0\x9f\x98").length, 3);
  EXPECT_EQ(decode("\xf0\x9f\x41").kind, Utf8Char::kInvalid);
  EXPECT_EQ(decode("\xf0\x9f\x41").length, 2);
}

}  // namespace
}  // namespace altiplano

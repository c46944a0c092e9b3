#include "server/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>

namespace altiplano {
namespace {

TEST(StopMatcher, HoldsBackOnlyWhatCouldStillMatch) {
  StopMatcher matcher({"END", "\n\n"}, false);
  EXPECT_EQ(matcher.Push("hello E"), "hello ");
  EXPECT_EQ(matcher.Push("N"), "");
  EXPECT_EQ(matcher.Push("x\n"), "ENx");
  EXPECT_EQ(matcher.matched(), -1);
  EXPECT_EQ(matcher.Push("\ny"), "");
  EXPECT_EQ(matcher.matched(), 1);
  EXPECT_EQ(matcher.stop(matcher.matched()), "\n\n");
  EXPECT_EQ(matcher.Push("more"), "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, FlushGivesBackWhatWasHeld) {
  StopMatcher matcher({"abcabd"}, false);
  EXPECT_EQ(matcher.Push("abcab"), "");
  EXPECT_EQ(matcher.Push("cab"), "abc");
  EXPECT_EQ(matcher.Flush(), "abcab");
  EXPECT_EQ(matcher.Flush(), "");
  EXPECT_EQ(matcher.matched(), -1);
}

TEST(StopMatcher, TheMatchThatEndsFirstWinsThenTheLongest) {
  StopMatcher inner({"abcd", "bc"}, false);
  EXPECT_EQ(inner.Push("xabcd"), "xa");
  EXPECT_EQ(inner.matched(), 1);
  StopMatcher longest({"c", "abc", "bc"}, false);
  EXPECT_EQ(longest.Push("xabc"), "x");
  EXPECT_EQ(longest.matched(), 1);
  StopMatcher equal({"", "no", "no"}, true);
  EXPECT_EQ(equal.Push("say n"), "say ");
  EXPECT_EQ(equal.Push("o!"), "no");
  EXPECT_EQ(equal.matched(), 1);
}

TEST(StopMatcher, WithoutStopsEverythingPasses) {
  for (const std::vector<std::string>& stops : {std::vector<std::string>{}, {""}}) {
    StopMatcher matcher(stops, false);
    EXPECT_EQ(matcher.Push("text"), "text");
    EXPECT_EQ(matcher.Flush(), "");
    EXPECT_EQ(matcher.matched(), -1);
  }
}

struct Found {
  int stop;
  size_t end;  // of the match
};

std::optional<Found> SlowSearch(const std::vector<std::string>& stops, std::string_view text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<Found> best;
    for (size_t i = 0; i < stops.size(); ++i) {
      if (stops[i].empty() || !text.substr(0, end).ends_with(stops[i])) continue;
      if (!best || stops[i].size() > stops[static_cast<size_t>(best->stop)].size())
        best = Found{static_cast<int>(i), end};
    }
    if (best) return best;
  }
  return std::nullopt;
}

// The bytes that must be held back after `text`: its longest suffix that begins a stop.
size_t SlowHeld(const std::vector<std::string>& stops, std::string_view text) {
  for (size_t n = text.size(); n > 0; --n) {
    for (const std::string& stop : stops) {
      if (stop.starts_with(text.substr(text.size() - n))) return n;
    }
  }
  return 0;
}

TEST(StopMatcher, EqualsTheDefinitionWhateverTheChunks) {
  std::mt19937_64 random(9);
  for (int round = 0; round < 30'000; ++round) {
    const unsigned letters = 1 + random() % 3;
    const auto word = [&](size_t longest) {
      std::string text;
      for (size_t n = random() % (longest + 1); n > 0; --n) text += static_cast<char>('a' + random() % letters);
      return text;
    };
    std::vector<std::string> stops(random() % 5);
    for (std::string& stop : stops) stop = word(7);
    const std::string text = word(40);
    const bool include = random() % 2;
    const auto expected = SlowSearch(stops, text);

    StopMatcher matcher(stops, include);
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const size_t n = std::min<size_t>(random() % 6, text.size() - at);
      out += matcher.Push(std::string_view(text).substr(at, n));
      at += n;
      if (matcher.matched() < 0) {
        const std::string_view seen = std::string_view(text).substr(0, at);
        ASSERT_EQ(out, seen.substr(0, at - SlowHeld(stops, seen)));  // no more, and no less
      }
    }
    ASSERT_EQ(matcher.matched(), expected ? expected->stop : -1) << text;
    out += matcher.Flush();
    if (!expected) {
      ASSERT_EQ(out, text);
    } else {
      const size_t length = stops[static_cast<size_t>(expected->stop)].size();
      ASSERT_EQ(out, text.substr(0, expected->end - (include ? 0 : length)));
    }
  }
}

// Quadratic work anywhere in here would be 10^11 steps.
TEST(StopMatcher, LinearOnHostileStreams) {
  const size_t n = 1 << 19;
  StopMatcher matcher({std::string(n / 2, 'a') + "b", std::string(n / 2, 'a') + "c"}, false);
  size_t out = 0;
  for (size_t i = 0; i < n; ++i) out += matcher.Push("a").size();
  EXPECT_EQ(out, n - n / 2);
  EXPECT_EQ(matcher.Push("x").size(), n / 2 + 1);

  std::vector<std::string> many;
  for (int i = 0; i < 10'000; ++i) many.push_back("stop " + std::to_string(i) + "!");
  StopMatcher matcher_of_many(many, true);
  std::string text;
  while (text.size() < n) text += "stop 12345 ";
  EXPECT_EQ(matcher_of_many.Push(text).size() + matcher_of_many.Flush().size(), text.size());
  EXPECT_EQ(matcher_of_many.Push("stop 9999!"), "stop 9999!");
  EXPECT_EQ(matcher_of_many.matched(), 9999);
}

}  // namespace
}  // namespace altiplano

#include "server/cli/units.h"

#include <gtest/gtest.h>

namespace altiplano::cli {
namespace {

TEST(Units, Bytes) {
  struct {
    const char* text;
    uint64_t bytes;
  } good[] = {{"0", 0},
              {"4096", 4096},
              {"16GiB", 16ull << 30},
              {"1.5KiB", 1536},
              {"2 MB", 2000000},
              {"3kB", 3000},
              {"1TiB", 1ull << 40},
              {"7B", 7},
              {"0.5GiB", 1u << 29}};
  for (const auto& c : good) {
    auto bytes = ParseBytes(c.text);
    ASSERT_TRUE(bytes.ok()) << c.text << ": " << bytes.status().ToString();
    EXPECT_EQ(*bytes, c.bytes) << c.text;
  }
  for (const char* bad : {"", "GiB", "-1", "+1", "1e3", "0x10", "16Gb", "16 GiB ", "1.2.3", ".5GiB", "5.GiB", "inf",
                          "nan", "99999999999TiB", "1.0001B", "16GiBs"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
}

TEST(Units, Durations) {
  using namespace std::chrono_literals;
  struct {
    const char* text;
    Duration duration;
  } good[] = {{"30s", 30s}, {"1.5m", 90s}, {"250ms", 250ms}, {"2h", 2h}, {"0", 0s}, {"10us", 10us}, {"7ns", 7ns}};
  for (const auto& c : good) {
    auto duration = ParseDuration(c.text);
    ASSERT_TRUE(duration.ok()) << c.text << ": " << duration.status().ToString();
    EXPECT_EQ(*duration, c.duration) << c.text;
  }
  for (const char* bad : {"", "s", "-1s", "30", "30 sec", "1d", "9999999999h", "nan"}) {
    EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
  }
  EXPECT_EQ(ParseDuration("30").status().message(), "has no unit: write 30s for seconds, 30ms for milliseconds");
}

TEST(Units, Counts) {
  EXPECT_EQ(*ParseCount("42", 0, 100), 42);
  EXPECT_EQ(*ParseCount("-3", -5, 5), -3);
  for (const char* bad : {"", "4.0", "1k", "101", "-1", " 4", "4 ", "99999999999999999999"}) {
    EXPECT_FALSE(ParseCount(bad, 0, 100).ok()) << bad;
  }
}

TEST(Units, Lists) {
  EXPECT_EQ(*ParseCounts("1,-8,32", -10, 100), (std::vector<int64_t>{1, -8, 32}));
  EXPECT_EQ(*ParseCounts("7", 0, 100), (std::vector<int64_t>{7}));
  EXPECT_TRUE(ParseCounts("", 0, 100)->empty());
  for (const char* bad : {"1,", ",1", "1,,2", ",", "1;2", "1, 2", "101"}) {
    EXPECT_FALSE(ParseCounts(bad, 0, 100).ok()) << bad;
  }
  EXPECT_EQ(*ParseWords("blue,green"), (std::vector<std::string>{"blue", "green"}));
  for (const char* bad : {"blue,", ",blue", "blue,,green"}) EXPECT_FALSE(ParseWords(bad).ok()) << bad;
}

TEST(Units, Reals) {
  EXPECT_EQ(*ParseReal("0.25"), 0.25);
  for (const char* bad : {"", "nan", "inf", "1.0x", "--1"}) EXPECT_FALSE(ParseReal(bad).ok()) << bad;
}

TEST(Units, Addresses) {
  for (const char* good : {"127.0.0.1:50051", "[::1]:0", "localhost:80", "unix:/run/a.sock", "0.0.0.0:65535"}) {
    EXPECT_TRUE(CheckAddress(good).ok()) << good;
  }
  for (const char* bad : {"", ":", "50051", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80",
                          ":80", "unix:", "127.0.0.1:http"}) {
    EXPECT_FALSE(CheckAddress(bad).ok()) << bad;
  }
  EXPECT_EQ(CheckAddress("::1:80").message(), "must have its IPv6 address in brackets, as [::1]:50051");
  EXPECT_EQ(CheckAddress("http://host:80").message(), "must be HOST:PORT such as 127.0.0.1:50051, or unix:/path");
}

}  // namespace
}  // namespace altiplano::cli

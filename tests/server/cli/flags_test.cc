#include "server/cli/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace altiplano::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Command TestCommand() {
  return {
      .name = "test",
      .summary = "tests",
      .synopsis = "altiplano test",
      .notes = "",
      .flags =
          {{.name = "size", .type = FlagType::kBytes, .default_value = "1KiB", .meaning = "How big.", .least = "2B"},
           {.name = "wait", .type = FlagType::kDuration, .default_value = "2s", .meaning = "How long.", .least = "1ms"},
           {.name = "count", .type = FlagType::kCount, .default_value = "3", .max = 9, .alias = "number"},
           {.name = "streams", .type = FlagType::kCount, .default_value = "1", .min = 1},
           {.name = "seed", .type = FlagType::kSeed},
           {.name = "cache", .type = FlagType::kBool, .default_value = "true", .meaning = "Whether."},
           {.name = "json", .type = FlagType::kBool, .default_value = "false", .meaning = "JSON."},
           {.name = "stop", .type = FlagType::kText, .repeated = true},
           {.name = "dtype", .type = FlagType::kChoice, .default_value = "bf16", .choices = "bf16|f32"},
           {.name = "url", .type = FlagType::kUrl, .default_value = "127.0.0.1:50051"},
           {.name = "style",
            .type = FlagType::kChoice,
            .default_value = "none",
            .choices = "none|one-with-a-long-name|another-with-a-long-name|a-third-with-a-long-name"}},
      .max_positional = 1};
}

StatusOr<ParsedFlags> Parse(std::vector<std::string_view> arguments) {
  return ParsedFlags::Parse(TestCommand(), arguments);
}

TEST(Flags, DefaultsHoldUntilGiven) {
  auto flags = Parse({});
  ASSERT_TRUE(flags.ok()) << flags.status().ToString();
  EXPECT_EQ(flags->bytes("size"), 1024u);
  EXPECT_EQ(flags->duration("wait"), std::chrono::seconds(2));
  EXPECT_EQ(flags->count("count"), 3);
  EXPECT_TRUE(flags->boolean("cache"));
  EXPECT_FALSE(flags->boolean("json"));
  EXPECT_EQ(flags->text("dtype"), "bf16");
  EXPECT_FALSE(flags->given("size"));
  EXPECT_TRUE(flags->has("size"));
  EXPECT_FALSE(flags->has("sizes"));
}

TEST(Flags, EverySpelling) {
  auto flags = Parse(
      {"--size=2MiB", "--wait", "1.5m", "--number", "4", "--no-cache", "--json", "--stop", "a", "--stop=b", "folder"});
  ASSERT_TRUE(flags.ok()) << flags.status().ToString();
  EXPECT_EQ(flags->bytes("size"), 2u << 20);
  EXPECT_EQ(flags->duration("wait"), std::chrono::seconds(90));
  EXPECT_EQ(flags->count("count"), 4);  // by its alias
  EXPECT_FALSE(flags->boolean("cache"));
  EXPECT_TRUE(flags->boolean("json"));
  EXPECT_THAT(flags->all("stop"), ElementsAre("a", "b"));
  EXPECT_THAT(flags->positional(), ElementsAre("folder"));
  EXPECT_TRUE(flags->given("count"));
}

TEST(Flags, ValuesMayLookLikeFlagsAndAfterDashesNothingIsOne) {
  auto flags = Parse({"--stop", "--json", "--", "--wait"});
  ASSERT_TRUE(flags.ok()) << flags.status().ToString();
  EXPECT_THAT(flags->all("stop"), ElementsAre("--json"));
  EXPECT_FALSE(flags->boolean("json"));
  EXPECT_THAT(flags->positional(), ElementsAre("--wait"));
}

TEST(Flags, ErrorsNameWhatToDo) {
  struct {
    std::vector<std::string_view> arguments;
    std::string message;
  } cases[] = {
      {{"--sise", "1"}, "unknown flag --sise; did you mean --size?"},
      {{"--numbre=1"}, "unknown flag --numbre; did you mean --number?"},
      {{"--qqqqqqqqqqqqq"}, "unknown flag --qqqqqqqqqqqqq; see altiplano test --help"},
      {{"-json"}, "unknown flag -json; did you mean --json?"},
      {{"--no-size"}, "unknown flag --no-size"},
      {{"--size"}, "--size needs a value (SIZE)"},
      {{"--size", "16Gb"}, "--size is \"16Gb\", has the unit \"Gb\", must be one of B, KiB"},
      {{"--wait=30"}, "--wait is \"30\", has no unit: write 30s"},
      {{"--count", "10"}, "--count is \"10\", must be a whole number from 0 to 9"},
      {{"--size=1"}, "--size is \"1\", must be at least 2B"},
      {{"--wait=0"}, "--wait is \"0\", must be at least 1ms"},
      {{"--wait", "999us"}, "must be at least 1ms"},
      {{"--streams=0"}, "must be a whole number of at least 1"},
      {{"--seed", "18446744073709551616"}, "must be a whole number from 0 to 18446744073709551615"},
      {{"--seed=-1"}, "must be a whole number from 0 to 18446744073709551615"},
      {{"--seed="}, "must be a whole number from 0 to"},
      {{"--url", "grpcs://host:1"}, "must be HOST:PORT or unix:/path, with nothing, grpc:// or http:// before it"},
      {{"--url", "https://host:1/"}, "there is no TLS"},
      {{"--url", "dns:///host:1"}, "must be HOST:PORT or unix:/path"},
      {{"--url", "ipv4:127.0.0.1:1"}, "must be HOST:PORT or unix:/path"},
      {{"--url", "::1:50051"}, "must have its IPv6 address in brackets"},
      {{"--dtype", "fp32"}, "--dtype is \"fp32\", must be one of bf16|f32; did you mean f32?"},
      {{"--style", "nome"}, "did you mean none?"},
      {{"--url", "localhost"}, "--url is \"localhost\", must be HOST:PORT such as 127.0.0.1:50051"},
      {{"--url", "grpc://localhost/"}, "must be HOST:PORT"},
      {{"--cache=maybe"}, "--cache is \"maybe\", must be true or false"},
      {{"--count", "1", "--number", "2"}, "--count is given twice"},
      {{"a", "b"}, "unexpected argument \"b\""},
      {{"a", "--cache", "false"}, "--cache takes its value with an equals sign: --cache=false"},
      {{"a", "--cache", "x"}, "unexpected argument \"x\""},
      {{"a", "--cache", "--count", "1", "false"}, "unexpected argument \"false\""},
      {{"--stop", "\xFF"}, "is not valid UTF-8"},
  };
  for (const auto& c : cases) {
    auto flags = Parse(c.arguments);
    ASSERT_FALSE(flags.ok()) << c.message;
    EXPECT_EQ(flags.status().code(), Code::kInvalidArgument);
    EXPECT_THAT(flags.status().message(), HasSubstr(c.message));
    EXPECT_EQ(flags.status().message().find('\n'), std::string::npos) << "one line";
  }
}

TEST(Flags, UrlsMayHaveASchemeOrBeASocket) {
  for (std::string_view url :
       {"127.0.0.1:1", "grpc://[::1]:50051/", "http://localhost:80", "unix:/run/altiplano.sock"}) {
    EXPECT_TRUE(Parse({"--url", url}).ok()) << url;
  }
}

TEST(Flags, TheLeastIsAllowedAndSoIsEverySeed) {
  auto flags = Parse({"--size=2", "--wait=1ms", "--streams=1", "--seed", "18446744073709551615"});
  ASSERT_TRUE(flags.ok()) << flags.status().ToString();
  EXPECT_EQ(flags->bytes("size"), 2u);
  EXPECT_EQ(flags->duration("wait"), std::chrono::milliseconds(1));
  EXPECT_EQ(flags->seed("seed"), UINT64_MAX);
}

TEST(Flags, HelpTeachesEachFlag) {
  ASSERT_TRUE(Parse({"--help"})->help());
  ASSERT_TRUE(Parse({"-h"})->help());
  std::string help = HelpText(TestCommand());
  for (const char* part : {"altiplano test: tests", "--size SIZE", "How big.", "default 1KiB", "--[no-]cache",
                           "--dtype bf16|f32", "--style NAME\n", "One of: none, one-with-a-long-name, ",
                           "(also --number)", "may be repeated", "at least 2B", "at least 1ms", "at least 1\n"}) {
    EXPECT_THAT(help, HasSubstr(part));
  }
}

}  // namespace
}  // namespace altiplano::cli

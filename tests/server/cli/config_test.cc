#include "server/cli/config.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "server/base/strings.h"
#include "server/text/chat_format.h"

namespace altiplano::cli {
namespace {

namespace pb = google::protobuf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

void CollectFields(const pb::Descriptor* message, const std::string& prefix,
                   std::map<std::string, const pb::FieldDescriptor*>* fields) {
  for (int i = 0; i < message->field_count(); ++i) {
    const pb::FieldDescriptor* field = message->field(i);
    if (field->message_type() != nullptr) {
      CollectFields(field->message_type(), prefix + field->name() + ".", fields);
    } else {
      (*fields)[prefix + field->name()] = field;
    }
  }
}

Command ServeLike() {
  Command command{.name = "serve", .summary = "", .synopsis = "", .notes = "", .flags = {}};
  command.flags.assign(Settings().begin(), Settings().end());
  command.flags.push_back({.name = "config", .type = FlagType::kPath});
  return command;
}

StatusOr<EffectiveConfig> Resolve(std::vector<std::string_view> arguments, std::string_view file_text) {
  auto flags = ParsedFlags::Parse(ServeLike(), arguments);
  EXPECT_TRUE(flags.ok()) << flags.status().ToString();
  auto file = ParseConfig(file_text, "x.textproto");
  if (!file.ok()) return file.status();
  return ResolveConfig(*flags, &*file);
}

TEST(Config, EveryFieldIsAFlagAndTheReverse) {
  std::map<std::string, const pb::FieldDescriptor*> fields;
  CollectFields(config::v1::ServerConfig::descriptor(), "", &fields);
  std::set<std::string> named;
  std::set<std::string_view> flag_names;
  for (const Flag& flag : Settings()) {
    EXPECT_TRUE(flag_names.insert(flag.name).second) << "two flags --" << flag.name;
    EXPECT_TRUE(named.insert(std::string(flag.field)).second) << "two flags for " << flag.field;
    ASSERT_TRUE(fields.count(std::string(flag.field))) << "--" << flag.name << " names a field that is not there";
    const pb::FieldDescriptor* field = fields[std::string(flag.field)];
    EXPECT_TRUE(field->has_presence()) << flag.field << ": unset must differ from zero";
    switch (flag.type) {
      case FlagType::kBool:
        EXPECT_EQ(field->type(), pb::FieldDescriptor::TYPE_BOOL) << flag.field;
        break;
      case FlagType::kCount:
        EXPECT_GE(flag.min, 0) << flag.field;
        if (field->type() == pb::FieldDescriptor::TYPE_UINT32) {
          EXPECT_LE(flag.max, UINT32_MAX) << flag.field;
        } else {
          EXPECT_EQ(field->type(), pb::FieldDescriptor::TYPE_UINT64) << flag.field;
        }
        break;
      default:
        EXPECT_EQ(field->type(), pb::FieldDescriptor::TYPE_STRING) << flag.field;
    }
  }
  for (const auto& [path, field] : fields) EXPECT_TRUE(named.count(path)) << path << " has no flag";
}

TEST(Config, EverySettingIsDocumented) {
  for (const Flag& flag : Settings()) {
    EXPECT_GE(flag.meaning.size(), 15u) << flag.name;
    EXPECT_EQ(flag.meaning.back(), '.') << flag.name;
    EXPECT_FALSE(flag.group.empty()) << flag.name;
    if (flag.type != FlagType::kBool) {
      EXPECT_FALSE(flag.example.empty()) << flag.name;
      EXPECT_TRUE(CheckValue(flag, flag.example).ok()) << flag.name << ": " << flag.example;
    }
    EXPECT_TRUE(CheckValue(flag, flag.default_value).ok()) << flag.name << ": " << flag.default_value;
  }
}

TEST(Config, ChatFormatsAreThoseOfTheTextLayer) {
  const auto settings = Settings();
  const auto flag =
      std::find_if(settings.begin(), settings.end(), [](const Flag& f) { return f.name == "chat-format"; });
  std::string names = "auto|none";
  for (std::string_view name : ChatFormat::Names()) names += StrCat("|", name);
  EXPECT_EQ(flag->choices, names);
}

TEST(Config, FlagWinsOverFileAndFileOverDefault) {
  auto config = Resolve({"--listen", "0.0.0.0:1", "--no-enable-prefix-caching"},
                        "listen: \"127.0.0.1:2\"\nkv { memory: \"2GiB\"\n  block_size: 32 prefix_cache: true }\n");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->values.listen(), "0.0.0.0:1");
  EXPECT_EQ(config->origins["listen"], "--listen");
  EXPECT_EQ(config->values.kv().memory(), "2GiB");
  EXPECT_EQ(config->origins["kv.memory"], "x.textproto:2:6");
  EXPECT_EQ(config->values.kv().block_size(), 32u);
  EXPECT_EQ(config->origins["kv.block_size"], "x.textproto:3:3");
  EXPECT_FALSE(config->values.kv().prefix_cache());
  EXPECT_EQ(config->origins["kv.prefix_cache"], "--enable-prefix-caching");
  EXPECT_EQ(config->values.model().dtype(), "bf16");
  EXPECT_EQ(config->origins["model.dtype"], "default");
}

TEST(Config, ErrorsNameThePlaceAndTheNearestName) {
  struct {
    const char* text;
    std::string begin, part;
  } cases[] = {
      {"listn: \"127.0.0.1:2\"", "x.textproto:1:", "\"listn\".; did you mean listen?"},
      {"kv {\n  memroy: \"1GiB\"\n}", "x.textproto:2:", "did you mean memory?"},
      {"kv {\n  qqqqqqqqqqqqq: 1\n}", "x.textproto:2:", "there are memory, block_size, prefix_cache"},
      {"kv { memory: \"16Gb\" }", "x.textproto:1:6: kv.memory is \"16Gb\"", "must be one of B, KiB"},
      {"kv { memory: 16 }", "x.textproto:1:", "Expected string"},
      {"kv { block_size: \"16\" }", "x.textproto:1:", "Expected integer"},
      {"kv { block_size: 16", "x.textproto:1:", ""},
      {"kv { block_size: 4096 }", "x.textproto:1:6: kv.block_size is \"4096\"", "from 0 to 1024"},
      {"kv { block_size: 24 }", "x.textproto:1:6: ", "power of two"},
      {"listen: \"a\" listen: \"b\"", "x.textproto:1:", "specified multiple times"},
      {"log { level: \"warning\" }", "x.textproto:1:7: log.level is \"warning\"", "did you mean warn?"},
      {"drain { timeout: \"30\" }", "x.textproto:1:9: ", "has no unit"},
      {"[altiplano.config.v1.x]: 1", "x.textproto:1:", ""},
      {"\x01", "x.textproto:1:", ""},
  };
  for (const auto& c : cases) {
    auto config = Resolve({}, c.text);
    ASSERT_FALSE(config.ok()) << c.text;
    EXPECT_THAT(config.status().message(), StartsWith(c.begin)) << c.text;
    EXPECT_THAT(config.status().message(), HasSubstr(c.part)) << c.text;
    EXPECT_EQ(config.status().message().find('\n'), std::string::npos) << c.text;
  }
}

TEST(Config, PrintedConfigReadsBackAsTheSame) {
  auto config = Resolve({"--model", "a \"b\"\\\n\xC3\xBC", "--max-num-seqs=7"}, "threads { compute: 3 }");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  std::string printed = PrintConfig(*config);
  EXPECT_THAT(printed, HasSubstr("# --max-num-seqs\n"));
  EXPECT_THAT(printed, HasSubstr("# x.textproto:1:11\n"));
  EXPECT_THAT(printed, HasSubstr("# default\n"));
  auto again = Resolve({}, printed);
  ASSERT_TRUE(again.ok()) << again.status().ToString() << "\n" << printed;
  EXPECT_EQ(again->values.SerializeAsString(), config->values.SerializeAsString());
}

TEST(Config, UnreadableFileIsNamed) {
  auto flags = ParsedFlags::Parse(ServeLike(), std::vector<std::string_view>{"--config", "/nowhere/a.textproto"});
  auto config = ResolveConfig(*flags);
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), Code::kNotFound);
  EXPECT_THAT(config.status().message(), HasSubstr("cannot open /nowhere/a.textproto: No such file"));
  const std::string folder = ::testing::TempDir();
  flags = ParsedFlags::Parse(ServeLike(), std::vector<std::string_view>{"--config", folder});
  EXPECT_EQ(ResolveConfig(*flags).status().message(), StrCat("--config: cannot read ", folder, ": Is a directory"));
}

// By each of these every request would be refused, or every step overdue.
TEST(Config, LimitsThatAllowNothingAreRefusedByTheirFlags) {
  for (const auto& [flag, least] : {std::pair{"max-message-size", "1KiB"},
                                    {"max-streams-per-connection", "1 to"},
                                    {"keepalive-time", "1s"},
                                    {"keepalive-timeout", "1ms"},
                                    {"max-prompt-size", "1B"},
                                    {"max-sequences", "1 to"},
                                    {"max-queue-wait", "1ms"},
                                    {"max-unprepared-requests", "1 to"},
                                    {"max-unprepared-size", "1KiB"},
                                    {"max-unread-size", "1B"},
                                    {"max-unread-time", "1ms"},
                                    {"health-deadline", "1ms"},
                                    {"step-deadline", "1ms"},
                                    {"join-timeout", "1ms"}}) {
    const std::string name = StrCat("--", flag);
    const Status status = ParsedFlags::Parse(ServeLike(), std::vector<std::string_view>{name, "0"}).status();
    EXPECT_THAT(status.message(), StartsWith(StrCat(name, " is \"0\", must be "))) << flag;
    EXPECT_THAT(status.message(), HasSubstr(least)) << flag;
  }
  EXPECT_EQ(Resolve({}, "limits { queue_wait: \"0\" }").status().message(),
            "x.textproto:1:10: limits.queue_wait is \"0\", must be at least 1ms");
}

TEST(Config, TwoListenersHaveTwoAddresses) {
  for (const char* address : {"127.0.0.1:5", "unix:/run/altiplano:0"}) {
    EXPECT_THAT(Resolve({"--listen", address, "--admin-listen", address}, "").status().message(),
                HasSubstr(StrCat("--admin-listen: is ", address, ", as --listen is")));
  }
  EXPECT_TRUE(Resolve({"--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"}, "").ok());
  EXPECT_TRUE(Resolve({"--listen", "127.0.0.1:5", "--admin-listen", "127.0.0.1:6"}, "").ok());
}

TEST(Config, ShippedConfigsAreValid) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ALTIPLANO_SOURCE_DIR "/config")) {
    if (entry.path().extension() != ".textproto") continue;
    std::ifstream in(entry.path());
    std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    auto config = Resolve({}, text);
    EXPECT_TRUE(config.ok()) << entry.path() << ": " << config.status().ToString();
    ++files;
  }
  EXPECT_GE(files, 2);
}

}  // namespace
}  // namespace altiplano::cli

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <string>

#include "server/base/clock.h"
#include "server/base/json.h"
#include "server/base/listen_error.h"
#include "server/base/log.h"
#include "server/base/read_file.h"
#include "server/base/split.h"
#include "server/base/status.h"
#include "server/base/strings.h"

namespace altiplano {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Status, CarriesCodeMessageAndDetail) {
  EXPECT_TRUE(OkStatus().ok());
  ErrorDetail detail;
  detail.reason = "QUEUE_FULL";
  detail.retry_after = std::chrono::milliseconds(250);
  Status status(Code::kResourceExhausted, "the queue is full", detail);
  Status copy = status;
  EXPECT_EQ(copy.ToString(), "RESOURCE_EXHAUSTED: the queue is full");
  EXPECT_EQ(copy.reason(), "QUEUE_FULL");
  EXPECT_EQ(copy.detail()->retry_after, std::chrono::milliseconds(250));
  EXPECT_EQ(Status(Code::kInternal, "x").detail(), nullptr);
}

StatusOr<int> Half(int x) {
  if (x % 2 != 0) return Status(Code::kInvalidArgument, StrCat(x, " is odd"));
  return x / 2;
}
StatusOr<int> Quarter(int x) {
  ASSIGN_OR_RETURN(int half, Half(x));
  return Half(half);
}

TEST(Status, AssignOrReturnPassesTheFirstError) {
  EXPECT_EQ(*Quarter(8), 2);
  EXPECT_EQ(Quarter(7).status().message(), "7 is odd");
  EXPECT_EQ(Quarter(6).status().message(), "3 is odd");
}

TEST(StatusDeathTest, ValueOfAnErrorDies) {
  EXPECT_DEATH((void)Half(3).value(), "");
}

TEST(Strings, StrCatWritesNumbersShortest) {
  EXPECT_EQ(StrCat("a", 1, ' ', -2L, " ", 0.1f, " ", true), "a1 -2 0.1 true");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(16060522496), "14.96 GiB");
}

TEST(Strings, SplitKeepsEmptyParts) {
  using Parts = std::vector<std::string_view>;
  EXPECT_EQ(Split("a,,b,", ','), (Parts{"a", "", "b", ""}));
  EXPECT_EQ(Split("a,b", ';'), (Parts{"a,b"}));
  EXPECT_EQ(Split(",", ','), (Parts{"", ""}));
  EXPECT_EQ(Split("", ','), Parts{});
}

TEST(Strings, Utf8) {
  EXPECT_TRUE(IsValidUtf8("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"));
  for (std::string_view bad :
       {"\x80", "\xC0\x80", "\xC3", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xFF"}) {
    EXPECT_FALSE(IsValidUtf8(bad));
  }
}

TEST(Strings, ExcerptIsShortWholeAndPrintable) {
  EXPECT_EQ(Excerpt("", 4), "");
  EXPECT_EQ(Excerpt("caf\xC3\xA9", 5), "caf\xC3\xA9");
  EXPECT_EQ(Excerpt("caf\xC3\xA9", 4), "caf...");
  EXPECT_EQ(Excerpt("a\n\x7F\xC3", 13), "a\\x0a\\x7f\\xc3");
  EXPECT_EQ(Excerpt("a\n\x7F\xC3", 12), "a\\x0a\\x7f...");
}

TEST(Strings, NearestSuggestsOnlyWhatIsNear) {
  std::array<std::string_view, 3> names = {"listen", "model", "max-running"};
  EXPECT_EQ(Nearest("lisen", names), "listen");
  EXPECT_EQ(Nearest("max-runing", names), "max-running");
  EXPECT_EQ(Nearest("temperature", names), "");
}

TEST(ReadFile, IsWholeOrSaysWhyNot) {
  const std::string folder = ::testing::TempDir(), path = std::filesystem::path(folder) / "read_file";
  const std::string bytes = std::string(40000, 'x') + std::string("\0\n", 2);
  std::ofstream(path, std::ios::binary) << bytes;
  EXPECT_EQ(ReadFile(path, bytes.size()).value(), bytes);
  const Status large = ReadFile(path, bytes.size() - 1).status();
  EXPECT_EQ(large.code(), Code::kResourceExhausted);
  EXPECT_THAT(large.message(), HasSubstr(path + " has more than 39.06 KiB"));
  std::ofstream(path, std::ios::trunc).close();
  EXPECT_EQ(ReadFile(path, 0).value(), "");
  std::filesystem::remove(path);
  EXPECT_EQ(ReadFile(path, 9).status().code(), Code::kNotFound);
  EXPECT_EQ(ReadFile(path, 9).status().message(), StrCat("cannot open ", path, ": No such file or directory"));
  EXPECT_EQ(ReadFile(folder, 9).status().code(), Code::kDataLoss);
  EXPECT_EQ(ReadFile(folder, 9).status().message(), StrCat("cannot read ", folder, ": Is a directory"));
}

TEST(ParseJson, RefusesWhatNlohmannLetsThrough) {
  EXPECT_EQ((*ParseJson(R"({"a": [1, 2.5, "x"]})"))["a"][1], 2.5);
  EXPECT_THAT(ParseJson(R"({"a": 1, "a": 2})").status().message(), HasSubstr("duplicate key \"a\""));
  EXPECT_THAT(ParseJson(std::string(65, '[') + std::string(65, ']')).status().message(), HasSubstr("deeper than 64"));
  EXPECT_THAT(ParseJson(std::string(1000000, '[')).status().message(), HasSubstr("deeper than 64"));
  EXPECT_TRUE(ParseJson(std::string(64, '[') + std::string(64, ']')).ok());
  for (std::string_view bad : {"", "{", "[1] x", "{\"a\" 1}", "\"\xFF\"", "nul", "[1,]"}) {
    EXPECT_EQ(ParseJson(bad).status().code(), Code::kInvalidArgument) << bad;
  }
}

TEST(ParseJson, RefusesANulInsteadOfEndingThere) {
  for (const std::string_view bad : {std::string_view("{}\0x", 4), std::string_view("{}\0", 3)}) {
    const Status status = ParseJson(bad).status();
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("NUL byte (byte 3)"));
  }
  EXPECT_EQ(*ParseJson(R"("\u0000")"), std::string(1, '\0'));
}

TEST(ParseJson, QuotesOnlyAPrintableBeginningOfTheText) {
  EXPECT_THAT(ParseJson("[\"\xFF\"]").status().message(), HasSubstr("last read: '\"\\xff'"));
  const std::string key = std::string(63, 'k') + "\xC3\xA9";
  for (const std::string& bad : {"\"" + std::string(1000, 'x'), "{\"" + key + "\":1,\"" + key + "\":2}"}) {
    const Status status = ParseJson(bad).status();
    EXPECT_TRUE(IsValidUtf8(status.message())) << status.ToString();
    EXPECT_LE(status.message().size(), 300) << status.ToString();
  }
}

TEST(ParseJson, OrderedKeepsTheOrderOfTheText) {
  EXPECT_EQ(ParseOrderedJson(R"({"z": 1, "a": 2})")->dump(), R"({"z":1,"a":2})");
}

class LogLines : public ::testing::Test {
 protected:
  void TearDown() override { log::Init(log::Level::kInfo, log::Format::kAuto); }
  template <typename F>
  std::string Capture(log::Format format, F&& write) {
    log::Init(log::Level::kInfo, format);
    ::testing::internal::CaptureStderr();
    write();
    log::Flush();
    return ::testing::internal::GetCapturedStderr();
  }
};

TEST_F(LogLines, JsonIsOneObjectALine) {
  std::string line = Capture(log::Format::kJson, [] {
    log::Info("request finished", {{"request_id", "a\"b\nc"}, {"tokens", 12}, {"ttft", 0.25}, {"ok", true}});
  });
  auto parsed = ParseJson(line);
  ASSERT_TRUE(parsed.ok()) << line;
  EXPECT_EQ((*parsed)["event"], "request finished");
  EXPECT_EQ((*parsed)["request_id"], "a\"b\nc");
  EXPECT_EQ((*parsed)["tokens"], 12);
  EXPECT_EQ((*parsed)["ok"], true);
  EXPECT_EQ((*parsed)["level"], "info");
}

TEST_F(LogLines, TextCannotBeForged) {
  std::string line = Capture(log::Format::kText, [] { log::Warn("odd id", {{"request_id", "x\nERROR fake"}}); });
  EXPECT_THAT(line, HasSubstr("request_id=\"x\\nERROR fake\""));
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
}

TEST_F(LogLines, LevelFilters) {
  std::string text = Capture(log::Format::kText, [] {
    log::Debug("hidden");
    ASSERT_TRUE(log::SetLevel("error").ok());
    log::Warn("hidden too");
    log::Error("seen");
  });
  EXPECT_THAT(text, Not(HasSubstr("hidden")));
  EXPECT_THAT(text, HasSubstr("seen"));
  EXPECT_THAT(log::SetLevel("loud").message(), HasSubstr("must be one of"));
}

// A socket that listens on a free port of the loopback address.
class Listening {
 public:
  Listening() {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&at), size), 0);
    EXPECT_EQ(listen(fd_, 1), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&at), &size), 0);
    address_ = StrCat("127.0.0.1:", ntohs(at.sin_port));
  }
  ~Listening() { close(fd_); }
  const std::string& address() const { return address_; }

 private:
  const int fd_ = socket(AF_INET, SOCK_STREAM, 0);
  std::string address_;
};

TEST(WhyNotListening, SaysWhatTheSystemAnswersAndWhatToDo) {
  const Listening other;
  EXPECT_EQ(WhyNotListening(other.address()), "Address already in use: end what listens there, or name another port");
  EXPECT_THAT(WhyNotListening("nowhere.invalid:1"), HasSubstr(": name an address of this machine, or 0.0.0.0 for all"));
  EXPECT_THAT(WhyNotListening("192.0.2.1:1"), HasSubstr("Cannot assign requested address: no interface"));
  EXPECT_EQ(WhyNotListening("unix:/nowhere/x"), "No such file or directory: make the folder first, or name another");
  EXPECT_EQ(WhyNotListening("unix://nowhere/x"), WhyNotListening("unix:/nowhere/x"));
  EXPECT_THAT(WhyNotListening("unix:/etc/passwd"),
              HasSubstr("Address already in use: end what listens there or remove"));
  EXPECT_THAT(WhyNotListening("unix:/" + std::string(200, 'x')), HasSubstr("at most 107 bytes"));
  const std::string free = ::testing::TempDir() + "/free.sock";
  EXPECT_THAT(WhyNotListening("unix:" + free), HasSubstr("would be free now"));
  EXPECT_FALSE(std::filesystem::exists(free)) << "trying leaves nothing behind";
}

// Root may listen anywhere, and in a container often everybody may.
TEST(WhyNotListening, LowPortsTakeAPrivilege) {
  std::ifstream in("/proc/sys/net/ipv4/ip_unprivileged_port_start");
  int first = 1024;
  in >> first;
  if (geteuid() == 0 && seteuid(65534) != 0) GTEST_SKIP() << "cannot be another user";
  const std::string why = WhyNotListening("127.0.0.1:1");
  const std::string nowhere = WhyNotListening("unix:/usr/x.sock");
  ASSERT_EQ(seteuid(getuid()), 0);
  EXPECT_EQ(nowhere, "Permission denied: name a folder in which this user may make files");
  if (first <= 1) GTEST_SKIP() << "no port is low here";
  EXPECT_EQ(why, "Permission denied: low ports, mostly those below 1024, take CAP_NET_BIND_SERVICE; name a higher one");
}

TEST(FakeClock, MovesOnlyWhenTold) {
  FakeClock clock;
  TimePoint before = clock.Now();
  clock.Advance(std::chrono::seconds(2));
  EXPECT_EQ(clock.Now() - before, std::chrono::seconds(2));
}

}  // namespace
}  // namespace altiplano

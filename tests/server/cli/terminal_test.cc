#include "server/cli/terminal.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "server/base/log.h"

namespace altiplano::cli {
namespace {

// What a printer writes to a file.
class Capture {
 public:
  Capture() : file_(std::tmpfile()) {}
  ~Capture() { std::fclose(file_); }
  std::FILE* file() { return file_; }
  std::string text() {
    std::fflush(file_);
    std::rewind(file_);
    std::string text;
    for (int c = std::fgetc(file_); c != EOF; c = std::fgetc(file_)) text += static_cast<char>(c);
    return text;
  }

 private:
  std::FILE* file_;
};

TEST(Terminal, ControlCharactersCannotSteerIt) {
  EXPECT_EQ(Printable("plain \xC3\xA4\n\ttext"), "plain \xC3\xA4\n\ttext");
  EXPECT_EQ(Printable("a\x1B[2Jb"), "a\xEF\xBF\xBD[2Jb");
  EXPECT_EQ(Printable("a\xC2\x9B"
                      "b"),
            "a\xEF\xBF\xBD"
            "b");  // C1: CSI in one character
  EXPECT_EQ(Printable("\x7F\r"), "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(Terminal, EscapesAndStyleAreForThoseWhoTakeThem) {
  Capture file;
  EXPECT_FALSE(TakesEscapes(file.file()));
  const int pty = posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(pty, 0);
  ASSERT_EQ(grantpt(pty) + unlockpt(pty), 0);
  std::FILE* terminal = std::fopen(ptsname(pty), "r+");
  ASSERT_NE(terminal, nullptr);
  setenv("TERM", "xterm", 1);
  unsetenv("NO_COLOR");
  EXPECT_TRUE(TakesEscapes(terminal) && TakesStyle(terminal));
  setenv("NO_COLOR", "1", 1);
  EXPECT_TRUE(TakesEscapes(terminal) && !TakesStyle(terminal));
  unsetenv("NO_COLOR");
  setenv("TERM", "dumb", 1);
  EXPECT_FALSE(TakesEscapes(terminal) || TakesStyle(terminal));
  unsetenv("TERM");
  std::fclose(terminal);
  close(pty);
}

TEST(Terminal, HumanTime) {
  EXPECT_EQ(HumanTime(std::chrono::microseconds(1500)), "1.5 ms");
  EXPECT_EQ(HumanTime(std::chrono::milliseconds(1234)), "1.23 s");
}

TEST(Terminal, LoadingIsToldOfOnceItIsKnownOfHowMuch) {
  LoadProgressPrinter printer;
  ::testing::internal::CaptureStderr();
  printer({.bytes_done = 0, .bytes_total = 0, .seconds = 0.1});
  log::Flush();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  ::testing::internal::CaptureStderr();
  printer({.bytes_done = 5, .bytes_total = 5, .seconds = 0.1});
  log::Flush();
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("loading weights"), std::string::npos);
}

TEST(InterleavedPrinter, LinesAppearWhenFullAndKeepTheirLabel) {
  Capture out;
  InterleavedPrinter printer(out.file(), {"1| ", "2| "}, 10, false);
  printer.Print(0, "hello ");
  printer.Print(1, "other\nline");
  printer.Print(0, "wide world");
  printer.Print(1, "s");
  printer.Finish(0);
  printer.Finish(1);
  EXPECT_EQ(out.text(), "2| other\n1| hello wide\n1| world\n2| lines\n");
}

TEST(InterleavedPrinter, LongWordsBreakBetweenCodePoints) {
  Capture out;
  InterleavedPrinter printer(out.file(), {"| "}, 3, false);
  printer.Print(0, "\xC3\xA4\xC3\xB6\xC3\xBC\xC3\xA4\xC3\xB6");
  printer.Finish(0);
  EXPECT_EQ(out.text(), "| \xC3\xA4\xC3\xB6\xC3\xBC\n| \xC3\xA4\xC3\xB6\n");
}

TEST(InterleavedPrinter, ConcatenatedLinesAreTheText) {
  Capture out;
  InterleavedPrinter printer(out.file(), {""}, 7, false);
  std::string text = "one two three four five six seven eight nine ten";
  for (char c : text) printer.Print(0, std::string(1, c));
  printer.Finish(0);
  std::string joined = out.text();
  for (char& c : joined) {
    if (c == '\n') c = ' ';
  }
  EXPECT_EQ(joined, text + " ");
}

TEST(InterleavedPrinter, LiveLinesAreErasedBeforeTheNext) {
  Capture out;
  InterleavedPrinter printer(out.file(), {"1| "}, 10, true);
  printer.Print(0, "a");
  printer.Print(0, "b");
  printer.Finish(0);
  const std::string erase = "\033[A\033[2K";
  EXPECT_EQ(out.text(), "1| a\n" + erase + "1| ab\n" + erase + "1| ab\n");
}

}  // namespace
}  // namespace altiplano::cli

// What commands print on: a terminal gets live lines, anything else plain ones.
#pragma once

#include <cstdio>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/model/weights.h"

namespace altiplano::cli {

bool IsTerminal(std::FILE* file);
bool TakesEscapes(std::FILE* file);  // a terminal that is not "dumb": lines can be drawn again
bool TakesStyle(std::FILE* file);    // that, and the user has not set NO_COLOR (https://no-color.org)

// One line for whoever started this program, on stdout at once. A reader that is gone is a warning, not an error:
// the program goes on without it.
void PrintReadyLine(std::string line);

// "1.23 s", "45.6 ms".
std::string HumanTime(Duration d);

// Control characters (but newline and tab) of a model's text would steer the terminal: they become U+FFFD.
std::string Printable(std::string_view text);

// How far a checkpoint is read or written, on stderr: one live line on a terminal, else a log line every five seconds
// and at the end. One thread.
class LoadProgressPrinter {
 public:
  explicit LoadProgressPrinter(std::string_view doing = "loading weights") : doing_(doing) {}
  void operator()(const LoadProgress& progress);

 private:
  std::string_view doing_;  // a literal
  Duration next_line_ = std::chrono::seconds(5);
};

// Several streams of text side by side on stdout, each line with its stream's label. On a terminal the unfinished lines
// are shown live below the finished ones; elsewhere a line appears when it is full. Any thread.
class InterleavedPrinter {
 public:
  // labels: of equal width, one for each stream. width: columns of text after the label.
  InterleavedPrinter(std::FILE* out, std::vector<std::string> labels, size_t width, bool live);
  void Print(size_t stream, std::string_view text);
  void Finish(size_t stream);  // writes its unfinished line

 private:
  void EraseLive();
  void DrawLive();
  void Emit(size_t stream, std::string_view line);
  void EmitFullLines(size_t stream);

  std::FILE* const out_;
  const std::vector<std::string> labels_;
  const size_t width_;
  const bool live_;
  std::mutex mutex_;                // guards what follows
  std::vector<std::string> lines_;  // unfinished
  size_t drawn_ = 0;                // live lines on the screen
};

}  // namespace altiplano::cli

#include "server/cli/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

// Columns, near enough: code points.
size_t CodePoints(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// Bytes of the first `count` code points.
size_t BytesOf(std::string_view text, size_t count) {
  size_t at = 0;
  while (at < text.size() && count-- > 0) {
    ++at;
    while (at < text.size() && (text[at] & 0xC0) == 0x80) ++at;
  }
  return at;
}

}  // namespace

bool IsTerminal(std::FILE* file) {
  return isatty(fileno(file)) != 0;
}

bool TakesEscapes(std::FILE* file) {
  const char* term = std::getenv("TERM");
  return IsTerminal(file) && term != nullptr && std::string_view(term) != "dumb";
}

bool TakesStyle(std::FILE* file) {
  const char* no_color = std::getenv("NO_COLOR");
  return TakesEscapes(file) && (no_color == nullptr || *no_color == '\0');
}

// Not through stdio, which would keep what it cannot write and fail again at the end.
void PrintReadyLine(std::string line) {
  line += '\n';
  if (write(STDOUT_FILENO, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    log::Warn("the READY line could not be written to stdout", {{"error", std::strerror(errno)}});
  }
}

std::string HumanTime(Duration d) {
  double seconds = Seconds(d);
  return seconds < 1 ? StrFormat("%.1f ms", seconds * 1e3) : StrFormat("%.2f s", seconds);
}

std::string Printable(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    auto byte = static_cast<unsigned char>(text[i]);
    bool c1 = byte == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (c1) ++i;
    if (c1 || (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7F) {
      out += "\xEF\xBF\xBD";
    } else {
      out += text[i];
    }
  }
  return out;
}

void LoadProgressPrinter::operator()(const LoadProgress& progress) {
  if (progress.bytes_total == 0) return;  // not known yet
  double rate = progress.seconds > 0 ? static_cast<double>(progress.bytes_done) / progress.seconds / 1e9 : 0;
  bool done = progress.bytes_done == progress.bytes_total;
  if (!log::Enabled(log::Level::kInfo)) return;
  if (TakesEscapes(stderr)) {
    std::fprintf(stderr, "\r\033[K%s: %s of %s, %.2f GB/s%s", std::string(doing_).c_str(),
                 HumanBytes(progress.bytes_done).c_str(), HumanBytes(progress.bytes_total).c_str(), rate,
                 done ? "\n" : "");
    std::fflush(stderr);
    return;
  }
  if (!done && progress.seconds < Seconds(next_line_)) return;
  while (Seconds(next_line_) <= progress.seconds) next_line_ += std::chrono::seconds(5);
  log::Info(doing_, {{"bytes", progress.bytes_done},
                     {"of", progress.bytes_total},
                     {"seconds", progress.seconds},
                     {"gb_per_second", rate}});
}

InterleavedPrinter::InterleavedPrinter(std::FILE* out, std::vector<std::string> labels, size_t width, bool live)
    : out_(out), labels_(std::move(labels)), width_(width), live_(live), lines_(labels_.size()) {}

void InterleavedPrinter::Print(size_t stream, std::string_view text) {
  std::lock_guard lock(mutex_);
  EraseLive();
  lines_[stream] += Printable(text);
  EmitFullLines(stream);
  DrawLive();
  std::fflush(out_);
}

void InterleavedPrinter::Finish(size_t stream) {
  std::lock_guard lock(mutex_);
  EraseLive();
  if (!lines_[stream].empty()) Emit(stream, lines_[stream]);
  lines_[stream].clear();
  DrawLive();
  std::fflush(out_);
}

// Breaks at newlines, else at the last blank before the width, else in the word.
void InterleavedPrinter::EmitFullLines(size_t stream) {
  std::string& line = lines_[stream];
  for (;;) {
    size_t newline = line.find('\n');
    std::string_view piece = std::string_view(line).substr(0, newline);
    if (CodePoints(piece) > width_) {
      size_t limit = BytesOf(piece, width_);
      size_t blank = piece.rfind(' ', limit);
      size_t end = blank == std::string_view::npos || blank == 0 ? limit : blank;
      Emit(stream, piece.substr(0, end));
      line.erase(0, end + (end == blank ? 1 : 0));
    } else if (newline != std::string::npos) {
      Emit(stream, piece);
      line.erase(0, newline + 1);
    } else {
      return;
    }
  }
}

void InterleavedPrinter::Emit(size_t stream, std::string_view line) {
  std::string text = StrCat(labels_[stream], line, "\n");
  std::fwrite(text.data(), 1, text.size(), out_);
}

void InterleavedPrinter::EraseLive() {
  for (; drawn_ > 0; --drawn_) std::fputs("\033[A\033[2K", out_);
}

void InterleavedPrinter::DrawLive() {
  if (!live_) return;
  for (size_t stream = 0; stream < lines_.size(); ++stream) {
    if (lines_[stream].empty()) continue;
    Emit(stream, lines_[stream]);
    ++drawn_;
  }
}

}  // namespace altiplano::cli

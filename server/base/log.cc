#include "server/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <ctime>

#include "server/base/strings.h"

namespace altiplano::log {

namespace {

constexpr std::array<std::string_view, 5> kNames = {"debug", "info", "warn", "error", "off"};

std::atomic<Level> g_level{Level::kInfo};
std::atomic<bool> g_json{false};

spdlog::logger& Logger() {
  // spdlog gives the locked stderr sink; the line is rendered here, so its own pattern is the bare message.
  static const std::shared_ptr<spdlog::logger> logger = [] {
    auto made = std::make_shared<spdlog::logger>("altiplano", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->set_level(spdlog::level::trace);
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return *logger;
}

std::string Timestamp() {
  auto now = std::chrono::system_clock::now().time_since_epoch();
  auto millis = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  std::time_t seconds = static_cast<std::time_t>(millis / 1000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return StrFormat("%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour,
                   utc.tm_min, utc.tm_sec, static_cast<int>(millis % 1000));
}

// Control bytes are escaped in both formats: a caller's string must not be able to forge a line.
void AppendQuoted(std::string& out, std::string_view text) {
  out += '"';
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (byte < 0x20 || byte == 0x7F) {
      out += StrFormat("\\u%04x", byte);
    } else {
      out += c;
    }
  }
  out += '"';
}

bool NeedsQuotes(std::string_view text) {
  if (text.empty()) return true;
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if (byte <= 0x20 || byte == 0x7F || c == '"' || c == '\\' || c == '=') return true;
  }
  return false;
}

}  // namespace

Field::Field(std::string_view k, double v) : key(k), value(StrFormat("%.6g", v)) {
  quoted = v != v || v - v != 0;  // JSON has neither NaN nor infinity
}

void Init(Level level, Format format) {
  g_level = level;
  g_json = format == Format::kJson || (format == Format::kAuto && isatty(STDERR_FILENO) == 0);
}

StatusOr<Level> ParseLevel(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Level>(i);
  }
  return Status(Code::kInvalidArgument,
                StrCat("log level is \"", name, "\", must be one of debug, info, warn, error, off"));
}

Status SetLevel(std::string_view name) {
  ASSIGN_OR_RETURN(Level level, ParseLevel(name));
  g_level = level;
  return OkStatus();
}

bool Enabled(Level level) {
  return level >= g_level.load(std::memory_order_relaxed);
}

void Write(Level level, std::string_view event, Fields fields) {
  if (!Enabled(level)) return;
  std::string_view name = kNames[static_cast<size_t>(level)];
  std::string line;
  if (g_json.load(std::memory_order_relaxed)) {
    line = StrCat("{\"ts\":\"", Timestamp(), "\",\"level\":\"", name, "\",\"event\":");
    AppendQuoted(line, event);
    for (const Field& field : fields) {
      line += ',';
      AppendQuoted(line, field.key);
      line += ':';
      if (field.quoted) {
        AppendQuoted(line, field.value);
      } else {
        line += field.value;
      }
    }
    line += '}';
  } else {
    line = StrCat(Timestamp(), " ", name, std::string(name.size() < 5 ? 5 - name.size() : 0, ' '), " ", event);
    for (const Field& field : fields) {
      line += StrCat("  ", field.key, "=");
      if (NeedsQuotes(field.value)) {
        AppendQuoted(line, field.value);
      } else {
        line += field.value;
      }
    }
  }
  Logger().log(spdlog::level::info, spdlog::string_view_t(line.data(), line.size()));
}

void Flush() {
  Logger().flush();
}

}  // namespace altiplano::log

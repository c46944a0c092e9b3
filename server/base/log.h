// Structured logging on stderr: one event, named fields. Text on a terminal, JSON lines elsewhere (or as configured).
// A line that concerns a request carries its id as field "request_id". Prompts and answers are never logged.
#pragma once

#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano::log {

enum class Level { kDebug, kInfo, kWarn, kError, kOff };
enum class Format { kAuto, kText, kJson };

// A name and a value already rendered; numbers stay bare in JSON.
struct Field {
  Field(std::string_view k, std::string_view v) : key(k), value(v), quoted(true) {}
  Field(std::string_view k, const char* v) : key(k), value(v), quoted(true) {}
  Field(std::string_view k, const std::string& v) : key(k), value(v), quoted(true) {}
  Field(std::string_view k, bool v) : key(k), value(v ? "true" : "false") {}
  Field(std::string_view k, double v);
  template <std::integral T>
  Field(std::string_view k, T v) : key(k), value(std::to_string(v)) {}

  std::string_view key;
  std::string value;
  bool quoted = false;
};
using Fields = std::initializer_list<Field>;

// Any thread, any time. Before Init: text on stderr, level info.
void Init(Level level, Format format);
Status SetLevel(std::string_view name);  // "debug" | "info" | "warn" | "error" | "off"
StatusOr<Level> ParseLevel(std::string_view name);
bool Enabled(Level level);

void Write(Level level, std::string_view event, Fields fields);
inline void Debug(std::string_view event, Fields fields = {}) {
  Write(Level::kDebug, event, fields);
}
inline void Info(std::string_view event, Fields fields = {}) {
  Write(Level::kInfo, event, fields);
}
inline void Warn(std::string_view event, Fields fields = {}) {
  Write(Level::kWarn, event, fields);
}
inline void Error(std::string_view event, Fields fields = {}) {
  Write(Level::kError, event, fields);
}
void Flush();

}  // namespace altiplano::log

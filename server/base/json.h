// JSON from files and callers, through nlohmann with the guards it lacks: a depth limit (its recursive parts overflow
// the stack at 100k levels), refusal of duplicate keys (it silently keeps the last one), and errors as values.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

#include "server/base/status.h"

namespace altiplano {

using Json = nlohmann::json;                 // keys sorted
using OrderedJson = nlohmann::ordered_json;  // keys in the order of the text

inline constexpr int kMaxJsonDepth = 64;

// INVALID_ARGUMENT with byte offset on malformed text, trailing bytes, invalid UTF-8, duplicate keys or depth >
// max_depth.
StatusOr<Json> ParseJson(std::string_view text, int max_depth = kMaxJsonDepth);
StatusOr<OrderedJson> ParseOrderedJson(std::string_view text, int max_depth = kMaxJsonDepth);

}  // namespace altiplano

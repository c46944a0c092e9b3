// JSON from files and callers, through nlohmann with the guards it lacks: a depth limit (its recursive parts overflow
// the stack at 100k levels), refusal of duplicate keys (it silently keeps the last one), and errors as values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "server/base/json_fwd.h"
#include "server/base/status.h"

namespace altiplano {

// INVALID_ARGUMENT with byte offset on malformed text, trailing bytes, invalid UTF-8, duplicate keys or depth >
// max_depth.
StatusOr<Json> ParseJson(std::string_view text, int max_depth = kMaxJsonDepth);
StatusOr<OrderedJson> ParseOrderedJson(std::string_view text, int max_depth = kMaxJsonDepth);

// nlohmann takes a NUL for the end of the text, whatever follows. INVALID_ARGUMENT with its byte offset: JSON has none.
Status CheckNoNul(std::string_view text);

// What nlohmann says of a malformed text, for the parse_error of a json_sax. It quotes the text, so it is an excerpt.
std::string JsonErrorText(std::size_t position, const nlohmann::detail::exception& error);

}  // namespace altiplano

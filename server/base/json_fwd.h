// The names of base/json.h without nlohmann's definitions, which are seconds of compiling: for headers.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace altiplano {

using Json = nlohmann::json;                 // keys sorted
using OrderedJson = nlohmann::ordered_json;  // keys in the order of the text

inline constexpr int kMaxJsonDepth = 64;

}  // namespace altiplano

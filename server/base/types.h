// Words that every layer shares.
#pragma once

#include <cstdint>

namespace altiplano {

using TokenId = int32_t;

// A request inside this process: unique for its lifetime, never reused, never seen or chosen by a client.
using RequestKey = uint64_t;

}  // namespace altiplano

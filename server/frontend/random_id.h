// Numbers nobody can guess: request ids and seeds that clients did not choose.
#pragma once

#include <cstdint>
#include <string>

namespace altiplano {

uint64_t RandomU64();
std::string RandomUuid();  // version 4, RFC 9562: "3f1c0a52-...": 36 characters

}  // namespace altiplano

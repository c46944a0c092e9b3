// HMAC with SHA-256 (RFC 2104).
#pragma once

#include <string_view>

#include "server/base/sha256.h"

namespace altiplano {

Sha256Digest HmacSha256(std::string_view key, std::string_view message);

// In a time that says nothing about where they differ, only whether their lengths do.
bool EqualInConstantTime(std::string_view a, std::string_view b);

}  // namespace altiplano

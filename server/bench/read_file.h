// Whole files, as traces are published: plain or gzipped.
#pragma once

#include <string>

#include "server/base/status.h"

namespace altiplano::bench {

// NOT_FOUND without the file, DATA_LOSS when it cannot be read or unpacked, RESOURCE_EXHAUSTED above 4 GiB unpacked.
StatusOr<std::string> ReadMaybeGzipped(const std::string& path);

}  // namespace altiplano::bench

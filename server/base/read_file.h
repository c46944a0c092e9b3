// Whole small files: settings, secrets, a model's config.
#pragma once

#include <cstddef>
#include <string>

#include "server/base/status.h"

namespace altiplano {

// NOT_FOUND when it cannot be opened, DATA_LOSS when it cannot be read (a folder), RESOURCE_EXHAUSTED with more than
// `most` bytes; each names path and reason. Any thread.
StatusOr<std::string> ReadFile(const std::string& path, size_t most);

}  // namespace altiplano

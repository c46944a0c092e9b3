// Files that commands write whole.
#pragma once

#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano::cli {

// UNAVAILABLE names the path and what the system says. What was there before is replaced only by a whole file.
Status WriteFile(const std::string& path, std::string_view contents);

}  // namespace altiplano::cli

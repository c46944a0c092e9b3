// Files that commands write whole.
#pragma once

#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano::cli {

// UNAVAILABLE names the path and what the system says. What was there before is replaced only by a whole file.
Status WriteFile(const std::string& path, std::string_view contents);

// For who will write the file after long work: UNAVAILABLE as WriteFile's when its folder is not there or may not be
// written to.
Status CheckFolderOf(const std::string& path);

}  // namespace altiplano::cli

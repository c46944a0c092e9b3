#include "server/cli/write_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

Status CannotWrite(const std::string& path, int error) {
  return Status(Code::kUnavailable, StrCat("cannot write ", path, ": ", std::strerror(error)));
}

}  // namespace

Status CheckFolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path();
  return access(folder.empty() ? "." : folder.c_str(), W_OK) == 0 ? OkStatus() : CannotWrite(path, errno);
}

Status WriteFile(const std::string& path, std::string_view contents) {
  auto failed = [&path](int error) { return CannotWrite(path, error); };
  // A device or a pipe is written where it is.
  std::error_code ignored;
  const bool special = std::filesystem::exists(path, ignored) && !std::filesystem::is_regular_file(path, ignored);
  const std::string partial = special ? path : path + ".part";
  // A file of ours alone: in a folder for all, like /tmp, a link of somebody else's may wait under that name.
  if (!special) std::remove(partial.c_str());
  std::FILE* file = std::fopen(partial.c_str(), special ? "wb" : "wbx");
  if (file == nullptr) return failed(errno);
  const bool written = std::fwrite(contents.data(), 1, contents.size(), file) == contents.size();
  const int error = errno;
  if (std::fclose(file) != 0 || !written) {
    const int why = written ? errno : error;
    if (!special) std::remove(partial.c_str());
    return failed(why);
  }
  if (!special && std::rename(partial.c_str(), path.c_str()) != 0) return failed(errno);
  return OkStatus();
}

}  // namespace altiplano::cli

#include "server/base/read_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "server/base/strings.h"

namespace altiplano {

StatusOr<std::string> ReadFile(const std::string& path, size_t most) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) return Status(Code::kNotFound, StrCat("cannot open ", path, ": ", std::strerror(errno)));
  std::string contents;
  char chunk[1 << 14];
  while (const size_t got = std::fread(chunk, 1, sizeof chunk, file.get())) {
    if (got > most - contents.size()) {
      return Status(Code::kResourceExhausted, StrCat(path, " has more than ", HumanBytes(most)));
    }
    contents.append(chunk, got);
  }
  if (std::ferror(file.get()) != 0) {
    return Status(Code::kDataLoss, StrCat("cannot read ", path, ": ", std::strerror(errno)));
  }
  return contents;
}

}  // namespace altiplano

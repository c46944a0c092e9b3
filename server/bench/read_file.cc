#include "server/bench/read_file.h"

#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "server/base/strings.h"

namespace altiplano::bench {

StatusOr<std::string> ReadMaybeGzipped(const std::string& path) {
  constexpr size_t kChunk = 1 << 20, kMost = size_t{4} << 30;
  std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);  // reads plain files too
  if (file == nullptr) {
    return Status(Code::kNotFound, StrCat("cannot open ", path, ": ", std::strerror(errno)));
  }
  std::string contents;
  for (;;) {
    const size_t before = contents.size();
    if (before > kMost) return Status(Code::kResourceExhausted, StrCat(path, " unpacks to more than 4 GiB"));
    contents.resize(before + kChunk);
    const int got = gzread(file.get(), contents.data() + before, static_cast<unsigned>(kChunk));
    int code = Z_OK;
    const char* message = gzerror(file.get(), &code);
    if (got < 0 || (code != Z_OK && code != Z_STREAM_END)) {
      return Status(Code::kDataLoss,
                    StrCat("cannot read ", path, ": ", code == Z_ERRNO ? std::strerror(errno) : message));
    }
    contents.resize(before + static_cast<size_t>(got));
    if (got == 0) return contents;
  }
}

}  // namespace altiplano::bench

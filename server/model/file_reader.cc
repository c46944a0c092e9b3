#include "server/model/file_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr size_t kMaxRead = size_t{1} << 30;  // Linux gives at most 2 GiB - 4 KiB a call

Status Short(const std::string& name, uint64_t offset, size_t wanted, size_t found, uint64_t size) {
  return Status(Code::kDataLoss, StrCat(name, ": wanted ", wanted, " bytes at offset ", offset, ", found ", found,
                                        " (the file had ", size, " bytes when it was opened)"));
}

Status SystemError(const std::string& path, int error) {
  Code code = error == ENOENT || error == ENOTDIR ? Code::kNotFound
              : error == EACCES || error == EPERM ? Code::kPermissionDenied
                                                  : Code::kUnavailable;
  return Status(code, StrCat(path, ": ", std::strerror(error)));
}

}  // namespace

StatusOr<std::shared_ptr<const FileReader>> FileReader::Open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError(path, errno);
  struct stat info {};
  if (::fstat(fd, &info) != 0) {
    Status status = SystemError(path, errno);
    ::close(fd);
    return status;
  }
  if (!S_ISREG(info.st_mode)) {
    ::close(fd);
    return Status(Code::kInvalidArgument, StrCat(path, ": is not a regular file"));
  }
  return std::shared_ptr<const FileReader>(new FileReader(path, fd, static_cast<uint64_t>(info.st_size)));
}

FileReader::~FileReader() {
  ::close(fd_);
}

Status FileReader::ReadAt(uint64_t offset, void* out, size_t bytes) const {
  size_t done = 0;
  while (done < bytes) {
    ssize_t n = ::pread(fd_, static_cast<char*>(out) + done, std::min(bytes - done, kMaxRead),
                        static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return Status(Code::kDataLoss,
                    StrCat(name_, ": reading ", bytes, " bytes at offset ", offset, ": ", std::strerror(errno)));
    }
    if (n == 0) return Short(name_, offset, bytes, done, size_);
    done += static_cast<size_t>(n);
  }
  return OkStatus();
}

Status MemoryReader::ReadAt(uint64_t offset, void* out, size_t bytes) const {
  size_t available = offset < bytes_.size() ? bytes_.size() - static_cast<size_t>(offset) : 0;
  if (available < bytes) return Short(name_, offset, bytes, available, bytes_.size());
  if (bytes > 0) std::memcpy(out, bytes_.data() + offset, bytes);
  return OkStatus();
}

StatusOr<std::string> ReadWholeFile(const std::string& path, uint64_t max_bytes) {
  ASSIGN_OR_RETURN(auto file, FileReader::Open(path));
  if (file->size() > max_bytes) {
    return Status(Code::kInvalidArgument,
                  StrCat(path, ": has ", file->size(), " bytes, at most ", max_bytes, " are read"));
  }
  std::string bytes(static_cast<size_t>(file->size()), '\0');
  RETURN_IF_ERROR(file->ReadAt(0, bytes.data(), bytes.size()));
  return bytes;
}

}  // namespace altiplano

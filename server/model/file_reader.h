// Bytes at an offset: of a file by pread (never mmap: a file that shrinks must be an error and not a SIGBUS), or of
// memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano {

class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual const std::string& name() const = 0;  // for messages
  virtual uint64_t size() const = 0;            // when it was opened
  // All `bytes` or an error (DATA_LOSS naming file, offset, wanted and found). Any thread.
  virtual Status ReadAt(uint64_t offset, void* out, size_t bytes) const = 0;
};

class FileReader final : public ByteSource {
 public:
  // NOT_FOUND, PERMISSION_DENIED, or INVALID_ARGUMENT for what is not a regular file. Follows symbolic links.
  static StatusOr<std::shared_ptr<const FileReader>> Open(const std::string& path);
  ~FileReader() override;
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& name() const override { return name_; }
  uint64_t size() const override { return size_; }
  Status ReadAt(uint64_t offset, void* out, size_t bytes) const override;

 private:
  FileReader(std::string name, int fd, uint64_t size) : name_(std::move(name)), fd_(fd), size_(size) {}
  const std::string name_;
  const int fd_;
  const uint64_t size_;
};

// Borrows `bytes`.
class MemoryReader final : public ByteSource {
 public:
  MemoryReader(std::string name, std::string_view bytes) : name_(std::move(name)), bytes_(bytes) {}
  const std::string& name() const override { return name_; }
  uint64_t size() const override { return bytes_.size(); }
  Status ReadAt(uint64_t offset, void* out, size_t bytes) const override;

 private:
  const std::string name_;
  const std::string_view bytes_;
};

// The whole of a small file; INVALID_ARGUMENT when it is larger than max_bytes.
StatusOr<std::string> ReadWholeFile(const std::string& path, uint64_t max_bytes);

}  // namespace altiplano

#include "server/model/write_folder.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "server/base/json.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

namespace fs = std::filesystem;

struct File {
  std::string name;
  std::vector<const TensorInfo*> tensors;
};

class Writer {
 public:
  Writer(const Checkpoint& checkpoint, const std::string& folder, const WriteOptions& options)
      : checkpoint_(checkpoint), folder_(folder), options_(options), dtype_(checkpoint.config().stored_dtype) {}
  ~Writer() {
    if (finished_) return;
    std::error_code ignored;
    for (const fs::path& path : written_) fs::remove(path, ignored);
    if (made_folder_) fs::remove(folder_, ignored);
  }

  Status Write() {
    ASSIGN_OR_RETURN(const std::string config_json,
                     ModelConfigJson(checkpoint_.config(), checkpoint_.generation_defaults()));
    PlanFiles();
    RETURN_IF_ERROR(MakeFolder());
    for (const File& file : files_) RETURN_IF_ERROR(WriteTensors(file));
    if (files_.size() > 1) RETURN_IF_ERROR(WriteText("model.safetensors.index.json", IndexJson()));
    const TextAssets& text = checkpoint_.text_assets();
    if (!text.tokenizer_json.empty()) RETURN_IF_ERROR(WriteText("tokenizer.json", text.tokenizer_json));
    if (!text.chat_template.empty()) RETURN_IF_ERROR(WriteText("chat_template.jinja", text.chat_template));
    RETURN_IF_ERROR(WriteText("generation_config.json", GenerationDefaultsJson(checkpoint_.generation_defaults())));
    RETURN_IF_ERROR(WriteText("config.json", config_json));
    finished_ = true;
    return OkStatus();
  }

 private:
  static uint64_t Elements(const TensorInfo& tensor) {
    uint64_t count = 1;
    for (int64_t n : tensor.shape) count *= static_cast<uint64_t>(n);
    return count;
  }
  uint64_t Bytes(const TensorInfo& tensor) const { return Elements(tensor) * SizeOf(dtype_); }

  void PlanFiles() {
    uint64_t in_file = 0;
    for (const TensorInfo& tensor : checkpoint_.tensors()) {
      if (files_.empty() || in_file + Bytes(tensor) > options_.max_file_bytes) {
        files_.emplace_back();
        in_file = 0;
      }
      files_.back().tensors.push_back(&tensor);
      in_file += Bytes(tensor);
      bytes_total_ += Bytes(tensor);
    }
    for (size_t i = 0; i < files_.size(); ++i) {
      files_[i].name = files_.size() == 1 ? "model.safetensors"
                                          : StrFormat("model-%05zu-of-%05zu.safetensors", i + 1, files_.size());
    }
  }

  Status MakeFolder() {
    std::error_code error;
    if (fs::exists(folder_, error)) {
      if (!fs::is_directory(folder_, error) || !fs::is_empty(folder_, error)) {
        return Status(Code::kFailedPrecondition, StrCat(folder_, ": exists and is not an empty folder"));
      }
    } else {
      made_folder_ = fs::create_directories(folder_, error);
      if (!made_folder_) return Status(Code::kFailedPrecondition, StrCat(folder_, ": ", error.message()));
    }
    const fs::space_info space = fs::space(folder_, error);
    constexpr uint64_t kRest = 64 << 20;  // headers, tokenizer, configs
    if (!error && space.available < bytes_total_ + kRest) {
      return Status(Code::kResourceExhausted, StrCat(folder_, ": needs ", HumanBytes(bytes_total_ + kRest),
                                                     ", the disk has ", HumanBytes(space.available), " left"));
    }
    return OkStatus();
  }

  // A file that writes until the first error.
  class Output {
   public:
    explicit Output(const fs::path& path) : path_(path), file_(std::fopen(path.c_str(), "wb")) {
      Note(file_ != nullptr);
    }
    ~Output() {
      if (file_ != nullptr) std::fclose(file_);
    }
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;
    void Write(const void* data, size_t bytes) {
      if (error_ == 0) Note(std::fwrite(data, 1, bytes, file_) == bytes);
    }
    Status Close() {
      if (file_ != nullptr) Note(std::fclose(std::exchange(file_, nullptr)) == 0);
      return status();
    }
    Status status() const {
      if (error_ == 0) return OkStatus();
      return Status(error_ == ENOSPC ? Code::kResourceExhausted : Code::kUnavailable,
                    StrCat(path_.string(), ": cannot be written: ", std::strerror(error_)));
    }

   private:
    void Note(bool good) {
      if (!good && error_ == 0) error_ = errno != 0 ? errno : EIO;
    }
    const fs::path path_;
    std::FILE* file_;
    int error_ = 0;
  };

  Status WriteText(const std::string& name, const std::string& text) {
    written_.push_back(fs::path(folder_) / name);
    Output output(written_.back());
    output.Write(text.data(), text.size());
    return output.Close();
  }

  std::string Header(const File& file) const {
    OrderedJson header = OrderedJson::object();
    header["__metadata__"]["format"] = "pt";
    uint64_t at = 0;
    for (const TensorInfo* tensor : file.tensors) {
      header[tensor->name] = {{"dtype", dtype_ == DType::kBF16 ? "BF16" : "F32"},
                              {"shape", tensor->shape},
                              {"data_offsets", {at, at + Bytes(*tensor)}}};
      at += Bytes(*tensor);
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // tensors begin at a multiple of 8 bytes
    return text;
  }

  Status WriteTensors(const File& file) {
    written_.push_back(fs::path(folder_) / file.name);
    Output output(written_.back());
    const std::string header = Header(file);
    const uint64_t length = header.size();
    output.Write(&length, sizeof length);
    output.Write(header.data(), header.size());
    std::vector<char> piece;
    for (const TensorInfo* tensor : file.tensors) {
      const bool is_vector = tensor->shape.size() == 1;
      const int64_t rows = is_vector ? 1 : tensor->shape[0], columns = tensor->shape[is_vector ? 0 : 1];
      const int64_t row_bytes = columns * static_cast<int64_t>(SizeOf(dtype_));
      constexpr int64_t kPieceBytes = 8 << 20;
      const int64_t step = std::max<int64_t>(1, kPieceBytes / row_bytes);
      for (int64_t row = 0; row < rows; row += step) {
        const int64_t n = std::min(step, rows - row);
        piece.resize(static_cast<size_t>(n * row_bytes));
        RETURN_IF_ERROR(checkpoint_.Read(tensor->name, row, n, 0, columns, dtype_, piece.data(), columns));
        output.Write(piece.data(), piece.size());
        RETURN_IF_ERROR(output.status());
        bytes_done_ += piece.size();
        if (options_.progress) {
          const std::chrono::duration<double> since = std::chrono::steady_clock::now() - start_;
          options_.progress({.bytes_done = bytes_done_, .bytes_total = bytes_total_, .seconds = since.count()});
        }
        if (options_.cancelled && options_.cancelled()) return Status(Code::kCancelled, "writing was cancelled");
      }
    }
    return output.Close();
  }

  std::string IndexJson() const {
    OrderedJson map = OrderedJson::object();
    for (const File& file : files_) {
      for (const TensorInfo* tensor : file.tensors) map[tensor->name] = file.name;
    }
    return OrderedJson{{"metadata", {{"total_size", bytes_total_}}}, {"weight_map", std::move(map)}}.dump(2) + "\n";
  }

  const Checkpoint& checkpoint_;
  const std::string folder_;
  const WriteOptions& options_;
  const DType dtype_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::vector<File> files_;
  std::vector<fs::path> written_;
  uint64_t bytes_total_ = 0, bytes_done_ = 0;
  bool made_folder_ = false, finished_ = false;
};

}  // namespace

Status WriteFolder(const Checkpoint& checkpoint, const std::string& folder, const WriteOptions& options) {
  return Writer(checkpoint, folder, options).Write();
}

}  // namespace altiplano

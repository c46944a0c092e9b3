#include "server/model/checkpoint_stored.h"

#include <algorithm>
#include <utility>

#include "server/base/strings.h"

namespace altiplano {

namespace {

// What one Read holds besides its output: large enough for disks and system calls, small enough for a cache.
constexpr int64_t kChunkBytes = 1 << 20;

// Rows and columns of one tensor, from its file to where the caller wants them.
class RangeReader {
 public:
  RangeReader(const StoredTensor& tensor, const ByteSource& file, int64_t row_elements, int64_t col_begin, int64_t cols,
              DType dtype, uint64_t* bytes_read)
      : tensor_(tensor),
        file_(file),
        traits_(Traits(tensor.type)),
        row_bytes_(row_elements / traits_.block_elements * traits_.block_bytes),
        whole_rows_(cols == row_elements),
        straight_((tensor.type == StorageType::kF32 && dtype == DType::kF32) ||
                  (tensor.type == StorageType::kBF16 && dtype == DType::kBF16)),
        col_begin_(col_begin),
        cols_(cols),
        dtype_(dtype),
        bytes_read_(bytes_read) {}

  // Stored rows [first, first + rows). out_row(i) is where stored row i begins; when `dense`, those of consecutive
  // rows follow each other without a hole.
  template <typename OutRow>
  Status Run(int64_t first, int64_t rows, bool dense, const OutRow& out_row) {
    if (straight_ && whole_rows_ && dense) return Pull(first * row_bytes_, rows * row_bytes_, out_row(first));
    if (!whole_rows_ || row_bytes_ > kChunkBytes || straight_) {
      for (int64_t row = first; row < first + rows; ++row) RETURN_IF_ERROR(RowInSteps(row, out_row(row)));
      return OkStatus();
    }
    const int64_t step = std::max<int64_t>(1, kChunkBytes / row_bytes_);
    for (int64_t row = first; row < first + rows; row += step) {
      const int64_t n = std::min(step, first + rows - row);
      uint8_t* chunk = Chunk(n * row_bytes_);
      RETURN_IF_ERROR(Pull(row * row_bytes_, n * row_bytes_, chunk));
      for (int64_t i = 0; i < n; ++i) Convert(tensor_.type, chunk + i * row_bytes_, 0, cols_, dtype_, out_row(row + i));
    }
    return OkStatus();
  }

 private:
  // The wanted columns of one row, a chunk at a time, whole blocks at least.
  Status RowInSteps(int64_t row, char* out) {
    const int64_t row_offset = row * row_bytes_;
    if (straight_) return Pull(row_offset + col_begin_ * traits_.block_bytes, cols_ * traits_.block_bytes, out);
    const int64_t end = col_begin_ + cols_;
    const int64_t step = kChunkBytes / traits_.block_bytes * traits_.block_elements;
    for (int64_t col = col_begin_; col < end;) {
      const int64_t first_block = col / traits_.block_elements;
      const int64_t skip = col % traits_.block_elements;
      const int64_t n = std::min(step - skip, end - col);
      const int64_t blocks = (skip + n + traits_.block_elements - 1) / traits_.block_elements;
      uint8_t* chunk = Chunk(std::min(kChunkBytes, row_bytes_));
      RETURN_IF_ERROR(Pull(row_offset + first_block * traits_.block_bytes, blocks * traits_.block_bytes, chunk));
      Convert(tensor_.type, chunk, skip, n, dtype_, out);
      out += n * static_cast<int64_t>(SizeOf(dtype_));
      col += n;
    }
    return OkStatus();
  }

  Status Pull(int64_t offset, int64_t bytes, void* out) {
    RETURN_IF_ERROR(file_.ReadAt(tensor_.offset + static_cast<uint64_t>(offset), out, static_cast<size_t>(bytes)));
    if (bytes_read_ != nullptr) *bytes_read_ += static_cast<uint64_t>(bytes);
    return OkStatus();
  }

  uint8_t* Chunk(int64_t bytes) {
    if (bytes > chunk_bytes_) {
      chunk_ = std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(bytes));
      chunk_bytes_ = bytes;
    }
    return chunk_.get();
  }

  const StoredTensor& tensor_;
  const ByteSource& file_;
  const StorageTraits& traits_;
  const int64_t row_bytes_;
  const bool whole_rows_;
  const bool straight_;  // stored as wanted: no conversion
  const int64_t col_begin_, cols_;
  const DType dtype_;
  uint64_t* const bytes_read_;
  std::unique_ptr<uint8_t[]> chunk_;
  int64_t chunk_bytes_ = 0;
};

// Of an interleaved head of `dim` rows: stored row -> our row, and back.
int64_t OurRow(int64_t stored, int64_t dim) {
  const int64_t head = stored / dim, at = stored % dim;
  return head * dim + at % 2 * (dim / 2) + at / 2;
}
int64_t StoredRow(int64_t ours, int64_t dim) {
  const int64_t head = ours / dim, at = ours % dim;
  return head * dim + at % (dim / 2) * 2 + at / (dim / 2);
}

std::pair<int64_t, int64_t> RowsAndColumns(const std::vector<int64_t>& shape) {
  return shape.size() == 1 ? std::pair<int64_t, int64_t>(1, shape[0]) : std::pair(shape[0], shape[1]);
}

}  // namespace

StoredCheckpoint::StoredCheckpoint(CheckpointParts parts) : parts_(std::move(parts)) {
  bool all_bf16 = true;
  for (const StoredTensor& tensor : parts_.tensors) {
    infos_.push_back(tensor.info);
    by_name_[tensor.info.name] = &tensor;
    total_bytes_ += tensor.info.bytes;
    if (tensor.info.shape.size() == 2) all_bf16 = all_bf16 && tensor.type == StorageType::kBF16;
  }
  parts_.config.stored_dtype = all_bf16 ? DType::kBF16 : DType::kF32;
  if (parts_.config.tied_embeddings) by_name_["lm_head.weight"] = by_name_.at("model.embed_tokens.weight");
}

Status StoredCheckpoint::Read(std::string_view name, int64_t row_begin, int64_t rows, int64_t col_begin, int64_t cols,
                              DType dtype, void* out, int64_t out_stride, uint64_t* bytes_read) const {
  auto bad = [&](std::string why) {
    return Status(Code::kInvalidArgument, StrCat(parts_.path, ": tensor ", name, ": ", why));
  };
  auto found = by_name_.find(name);
  if (found == by_name_.end()) return bad("there is no such tensor");
  const StoredTensor& tensor = *found->second;
  const auto [all_rows, all_cols] = RowsAndColumns(tensor.info.shape);
  if (dtype != DType::kF32 && dtype != DType::kBF16) return bad(StrCat("cannot be read as ", Name(dtype)));
  if (row_begin < 0 || rows < 0 || row_begin > all_rows || rows > all_rows - row_begin) {
    return bad(StrCat("rows ", row_begin, " + ", rows, " of ", all_rows, " were asked for"));
  }
  if (col_begin < 0 || cols < 0 || col_begin > all_cols || cols > all_cols - col_begin) {
    return bad(StrCat("columns ", col_begin, " + ", cols, " of ", all_cols, " were asked for"));
  }
  if (rows > 1 && out_stride < cols)
    return bad(StrCat("an output stride of ", out_stride, " is less than ", cols, " columns"));
  if (rows == 0 || cols == 0) return OkStatus();

  RangeReader reader(tensor, *parts_.files[tensor.file], all_cols, col_begin, cols, dtype, bytes_read);
  const int64_t row_end = row_begin + rows, out_row_bytes = out_stride * static_cast<int64_t>(SizeOf(dtype));
  auto place = [&](int64_t our_row) { return static_cast<char*>(out) + (our_row - row_begin) * out_row_bytes; };
  const int64_t dim = tensor.interleaved_head_dim;
  if (dim == 0) return reader.Run(row_begin, rows, out_stride == cols, place);

  // Whole heads are read in one run and scattered; rows of a head that is cut, one by one.
  auto scatter = [&](int64_t stored_row) { return place(OurRow(stored_row, dim)); };
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t heads = row % dim == 0 ? (row_end - row) / dim : 0;
    if (heads > 0) {
      RETURN_IF_ERROR(reader.Run(row, heads * dim, false, scatter));
      row += heads * dim;
    } else {
      RETURN_IF_ERROR(reader.Run(StoredRow(row, dim), 1, false, scatter));
      ++row;
    }
  }
  return OkStatus();
}

}  // namespace altiplano

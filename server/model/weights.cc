#include "server/model/weights.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

// One contiguous read: rows of a checkpoint tensor to whole rows of one of ours.
struct Piece {
  std::string tensor;
  int64_t row_begin, rows, col_begin, cols;
  DType dtype;
  char* out;
  size_t bytes() const { return static_cast<size_t>(rows * cols) * SizeOf(dtype); }
};

constexpr size_t kAlign = 64;

size_t AlignUp(size_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Lays tensors out in one buffer: first ask for all of them, then Allocate, then take them in the same order.
class Arena {
 public:
  explicit Arena(const Stream& stream) : stream_(stream) {}
  void Reserve(std::initializer_list<int64_t> shape, DType dtype) { bytes_ += Bytes(shape, dtype); }
  bool Allocate() {
    buffer_ = Buffer::Allocate(stream_, std::max<size_t>(bytes_, 1));
    return static_cast<bool>(buffer_);
  }
  TensorView Take(std::initializer_list<int64_t> shape, DType dtype) {
    void* data = static_cast<char*>(buffer_.data()) + used_;
    used_ += Bytes(shape, dtype);
    return TensorView::Make(data, dtype, shape, stream_.device());
  }
  size_t bytes() const { return bytes_; }
  Buffer Release() { return std::move(buffer_); }

 private:
  static size_t Bytes(std::initializer_list<int64_t> shape, DType dtype) {
    size_t n = SizeOf(dtype);
    for (int64_t d : shape) n *= static_cast<size_t>(d);
    return AlignUp(n);
  }
  const Stream& stream_;
  size_t bytes_ = 0, used_ = 0;
  Buffer buffer_;
};

Status OutOfMemory(size_t bytes, std::string_view what) {
  return Status(Code::kResourceExhausted, StrCat("no memory for ", what, ": ", HumanBytes(bytes)));
}

Status Cancelled() {
  return Status(Code::kCancelled, "loading was cancelled");
}

Status NoDevice(const std::string& error) {
  return Status(Code::kUnavailable, error);
}

// Reads pieces to where they belong, one at a time. One thread.
class Reader {
 public:
  // most_bytes: of the largest piece.
  static StatusOr<Reader> Make(const Checkpoint& checkpoint, const LoadOptions& options, size_t most_bytes) {
    Reader reader(checkpoint);
    if (options.device == Device::kCpu) return reader;
    std::string error;
    reader.stream_ = Stream::Cuda(options.gpu, &error);
    if (reader.stream_ == nullptr) return NoDevice(error);
    reader.staging_ = Buffer::AllocateHost(*reader.stream_, most_bytes);
    if (!reader.staging_) return OutOfMemory(most_bytes, "a reader's pinned memory");
    return reader;
  }

  // *bytes grows by what came from disk.
  Status Read(const Piece& piece, uint64_t* bytes) {
    void* out = stream_ == nullptr ? piece.out : staging_.data();
    RETURN_IF_ERROR(checkpoint_->Read(piece.tensor, piece.row_begin, piece.rows, piece.col_begin, piece.cols,
                                      piece.dtype, out, piece.cols, bytes));
    if (stream_ == nullptr) return OkStatus();
    Copy(*stream_, piece.out, Device::kCuda, staging_.data(), Device::kCpu, piece.bytes());
    const std::string error = stream_->Synchronize();  // meanwhile the other readers read
    return error.empty() ? OkStatus() : NoDevice(error);
  }

 private:
  explicit Reader(const Checkpoint& checkpoint) : checkpoint_(&checkpoint) {}

  const Checkpoint* checkpoint_;
  std::unique_ptr<Stream> stream_;  // null: pieces are read into place
  Buffer staging_;
};

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const LoadOptions& options)
      : checkpoint_(checkpoint), config_(checkpoint.config()), options_(options), shard_(options.shard) {}

  StatusOr<LlamaWeights> Load() {
    std::string error;
    stream_ = Stream::Open(options_.device, options_.gpu, 1, &error);
    if (stream_ == nullptr) return NoDevice(error);
    RETURN_IF_ERROR(PlanOuter());
    weights_.layers.resize(static_cast<size_t>(shard_.layers(config_)));
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      if (options_.cancelled && options_.cancelled()) return Cancelled();
      RETURN_IF_ERROR(PlanLayer(i));
    }
    RETURN_IF_ERROR(ReadAll());
    return std::move(weights_);
  }

 private:
  Status PlanOuter() {
    int64_t vocab = shard_.vocab(config_);
    std::vector<float> inv_freq = RopeInverseFrequencies(config_);
    auto frequencies = static_cast<int64_t>(inv_freq.size());
    Arena arena(*stream_);
    const bool embeds = shard_.first_stage(), ends = shard_.last_stage();
    const bool shares = embeds && ends && config_.tied_embeddings;  // one matrix is both
    if (embeds) arena.Reserve({vocab, config_.hidden}, options_.dtype);
    if (ends && !shares) arena.Reserve({vocab, config_.hidden}, options_.dtype);
    if (ends) arena.Reserve({config_.hidden}, DType::kF32);
    arena.Reserve({frequencies}, DType::kF32);
    if (!arena.Allocate()) return OutOfMemory(arena.bytes(), "the embedding and the head");
    if (embeds) weights_.embedding = arena.Take({vocab, config_.hidden}, options_.dtype);
    if (ends) {
      weights_.lm_head = shares ? weights_.embedding : arena.Take({vocab, config_.hidden}, options_.dtype);
      weights_.final_norm = arena.Take({config_.hidden}, DType::kF32);
    }
    weights_.inv_freq = arena.Take({frequencies}, DType::kF32);
    weights_.bytes += arena.bytes();
    weights_.memory = arena.Release();

    // The last rank's part may reach past the vocabulary; those rows are zero.
    int64_t begin = shard_.vocab_begin(config_);
    int64_t rows = std::clamp<int64_t>(config_.vocab - begin, 0, vocab);
    for (const TensorView& table : {weights_.embedding, weights_.lm_head}) {
      if (table.empty()) continue;
      const int64_t row_bytes = config_.hidden * static_cast<int64_t>(SizeOf(table.dtype));
      Zero(*stream_, table.row<char>(0) + rows * row_bytes, static_cast<size_t>((vocab - rows) * row_bytes));
    }
    Copy(*stream_, weights_.inv_freq.data, options_.device, inv_freq.data(), Device::kCpu,
         inv_freq.size() * sizeof(float));
    if (const std::string error = stream_->Synchronize(); !error.empty()) return NoDevice(error);
    const std::string embedding = "model.embed_tokens.weight";
    if (embeds) AddMatrix(embedding, weights_.embedding, 0, begin, rows, 0, config_.hidden);
    if (ends && !shares) {
      AddMatrix(config_.tied_embeddings ? embedding : "lm_head.weight", weights_.lm_head, 0, begin, rows, 0,
                config_.hidden);
    }
    if (ends) AddVector("model.norm.weight", weights_.final_norm);
    return OkStatus();
  }

  Status PlanLayer(size_t of_stage) {
    LayerWeights& layer = weights_.layers[of_stage];
    const int64_t index = shard_.first_layer(config_) + static_cast<int64_t>(of_stage);
    const int64_t hidden = config_.hidden, dim = config_.head_dim;
    const int64_t q_rows = shard_.q_heads(config_) * dim, kv_rows = shard_.kv_heads(config_) * dim;
    const int64_t qkv_rows = q_rows + 2 * kv_rows, ffn = shard_.ffn(config_);
    Arena arena(*stream_);
    arena.Reserve({hidden}, DType::kF32);
    arena.Reserve({qkv_rows, hidden}, options_.dtype);
    arena.Reserve({hidden, q_rows}, options_.dtype);
    arena.Reserve({hidden}, DType::kF32);
    arena.Reserve({2 * ffn, hidden}, options_.dtype);
    arena.Reserve({hidden, ffn}, options_.dtype);
    if (!arena.Allocate()) return OutOfMemory(arena.bytes(), StrCat("layer ", index));
    layer.attention_norm = arena.Take({hidden}, DType::kF32);
    layer.qkv = arena.Take({qkv_rows, hidden}, options_.dtype);
    layer.o = arena.Take({hidden, q_rows}, options_.dtype);
    layer.ffn_norm = arena.Take({hidden}, DType::kF32);
    layer.gate_up = arena.Take({2 * ffn, hidden}, options_.dtype);
    layer.down = arena.Take({hidden, ffn}, options_.dtype);
    weights_.bytes += arena.bytes();
    layer.memory = arena.Release();

    const std::string prefix = StrCat("model.layers.", index, ".");
    const int64_t q_begin = shard_.rank * q_rows, kv_begin = shard_.first_kv_head(config_) * dim;
    const int64_t ffn_begin = shard_.rank * ffn;
    AddVector(prefix + "input_layernorm.weight", layer.attention_norm);
    AddMatrix(prefix + "self_attn.q_proj.weight", layer.qkv, 0, q_begin, q_rows, 0, hidden);
    AddMatrix(prefix + "self_attn.k_proj.weight", layer.qkv, q_rows, kv_begin, kv_rows, 0, hidden);
    AddMatrix(prefix + "self_attn.v_proj.weight", layer.qkv, q_rows + kv_rows, kv_begin, kv_rows, 0, hidden);
    AddMatrix(prefix + "self_attn.o_proj.weight", layer.o, 0, 0, hidden, q_begin, q_rows);
    AddVector(prefix + "post_attention_layernorm.weight", layer.ffn_norm);
    AddMatrix(prefix + "mlp.gate_proj.weight", layer.gate_up, 0, ffn_begin, ffn, 0, hidden);
    AddMatrix(prefix + "mlp.up_proj.weight", layer.gate_up, ffn, ffn_begin, ffn, 0, hidden);
    AddMatrix(prefix + "mlp.down_proj.weight", layer.down, 0, 0, hidden, ffn_begin, ffn);
    return OkStatus();
  }

  // Rows [row_begin, +rows) x columns [col_begin, +cols) of `tensor` into rows [out_row, +rows) of `out`.
  void AddMatrix(const std::string& tensor, const TensorView& out, int64_t out_row, int64_t row_begin, int64_t rows,
                 int64_t col_begin, int64_t cols) {
    CHECK(out.dim(1) == cols);
    const int64_t step = std::max<int64_t>(1, options_.piece_elements / cols);
    for (int64_t row = 0; row < rows; row += step) {
      int64_t n = std::min(step, rows - row);
      char* data =
          static_cast<char*>(out.data) + (out_row + row) * out.stride0 * static_cast<int64_t>(SizeOf(out.dtype));
      pieces_.push_back({tensor, row_begin + row, n, col_begin, cols, out.dtype, data});
    }
  }
  void AddVector(const std::string& tensor, const TensorView& out) {
    pieces_.push_back({tensor, 0, 1, 0, out.dim(0), out.dtype, static_cast<char*>(out.data)});
  }

  // Of all pieces, as stored.
  uint64_t BytesToRead() const {
    std::map<std::string_view, double> bytes_per_element;
    for (const TensorInfo& info : checkpoint_.tensors()) {
      double elements = 1;
      for (int64_t n : info.shape) elements *= static_cast<double>(n);
      bytes_per_element[info.name] = static_cast<double>(info.bytes) / elements;
    }
    double total = 0;
    for (const Piece& piece : pieces_) {
      total += bytes_per_element[piece.tensor] * static_cast<double>(piece.rows * piece.cols);
    }
    return static_cast<uint64_t>(total + 0.5);
  }

  Status ReadAll() {
    const auto start = std::chrono::steady_clock::now();
    const uint64_t bytes_total = BytesToRead();

    std::atomic<size_t> next{0};
    std::atomic<uint64_t> bytes{0};
    std::mutex mutex;
    std::condition_variable changed;
    Status first_error;  // guarded by mutex
    int running = 0;     // guarded by mutex
    std::atomic<bool> stop{false};
    size_t most_bytes = 0;
    for (const Piece& piece : pieces_) most_bytes = std::max(most_bytes, piece.bytes());
    auto read_pieces = [&]() -> Status {
      ASSIGN_OR_RETURN(Reader reader, Reader::Make(checkpoint_, options_, most_bytes));
      for (size_t i; !stop && (i = next.fetch_add(1)) < pieces_.size();) {
        uint64_t read = 0;
        const Status status = reader.Read(pieces_[i], &read);
        bytes += read;
        RETURN_IF_ERROR(status);
      }
      return OkStatus();
    };
    auto work = [&] {
      const Status status = read_pieces();
      std::lock_guard lock(mutex);
      if (!status.ok()) {
        if (first_error.ok()) first_error = status;
        stop = true;
      }
      if (--running == 0) changed.notify_all();
    };
    auto report = [&] {
      if (!options_.progress) return;
      LoadProgress progress;
      progress.bytes_done = bytes;
      progress.bytes_total = bytes_total;
      progress.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      options_.progress(progress);
    };

    running = std::max(1, options_.readers);
    std::vector<std::thread> readers;
    for (int i = running; i > 0; --i) readers.emplace_back(work);
    bool cancelled = false;
    {
      std::unique_lock lock(mutex);
      while (!changed.wait_for(lock, std::chrono::milliseconds(100), [&] { return running == 0; })) {
        lock.unlock();
        if (options_.cancelled && options_.cancelled()) cancelled = true, stop = true;
        report();
        lock.lock();
      }
    }
    for (std::thread& reader : readers) reader.join();
    RETURN_IF_ERROR(first_error);
    if (cancelled) return Cancelled();
    report();
    return OkStatus();
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const LoadOptions& options_;
  const Shard shard_;
  std::unique_ptr<Stream> stream_;  // for allocations
  LlamaWeights weights_;
  std::vector<Piece> pieces_;
};

}  // namespace

StatusOr<Shard> Shard::Make(const ModelConfig& config, int rank, int size, int stage, int stages) {
  auto refuse = [&](std::string_view what, int64_t n) {
    return Status(Code::kOutOfRange, StrCat("the model cannot be split into ", size, " ranks: ", n, " ", what,
                                            " do not divide by ", size));
  };
  if (size < 1 || rank < 0 || rank >= size) {
    return Status(Code::kOutOfRange, StrCat("rank ", rank, " of ", size, " does not exist"));
  }
  if (stages < 1 || stage < 0 || stage >= stages) {
    return Status(Code::kOutOfRange, StrCat("stage ", stage, " of ", stages, " does not exist"));
  }
  if (stages > config.layers) {
    return Status(Code::kOutOfRange,
                  StrCat("the model cannot be split into ", stages, " stages: it has ", config.layers, " layers"));
  }
  if (config.q_heads % size != 0) return refuse("query heads", config.q_heads);
  if (config.ffn % size != 0) return refuse("ffn rows", config.ffn);
  bool kv_ok = config.kv_heads >= size ? config.kv_heads % size == 0 : size % config.kv_heads == 0;
  if (!kv_ok) return refuse("KV heads", config.kv_heads);
  return Shard{rank, size, stage, stages};
}

uint64_t RankWeightBytes(const ModelConfig& c, const Shard& shard, DType dtype) {
  auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const uint64_t qkv = size(shard.q_heads(c) + 2 * shard.kv_heads(c)) * size(c.head_dim) * size(c.hidden);
  const uint64_t o = size(c.hidden) * size(shard.q_heads(c)) * size(c.head_dim);
  const uint64_t ffn = 3 * size(shard.ffn(c)) * size(c.hidden);
  const bool shares = c.tied_embeddings && shard.stages == 1;
  const int tables = (shard.first_stage() ? 1 : 0) + (shard.last_stage() && !shares ? 1 : 0);
  const uint64_t outer = size(shard.vocab(c)) * size(c.hidden) * size(tables);
  const uint64_t norms = (2 * size(shard.layers(c)) + (shard.last_stage() ? 1 : 0)) * size(c.hidden);
  return (outer + size(shard.layers(c)) * (qkv + o + ffn)) * SizeOf(dtype) + norms * SizeOf(DType::kF32);
}

LlamaWeights Share(std::shared_ptr<const LlamaWeights> weights) {
  LlamaWeights views;
  views.embedding = weights->embedding;
  views.final_norm = weights->final_norm;
  views.lm_head = weights->lm_head;
  views.inv_freq = weights->inv_freq;
  for (const LayerWeights& layer : weights->layers) {
    views.layers.push_back(
        {layer.attention_norm, layer.qkv, layer.o, layer.ffn_norm, layer.gate_up, layer.down, Buffer()});
  }
  views.bytes = weights->bytes;
  views.shared = std::move(weights);
  return views;
}

StatusOr<LlamaWeights> LoadWeights(const Checkpoint& checkpoint, const LoadOptions& options) {
  return Loader(checkpoint, options).Load();
}

StatusOr<std::vector<LlamaWeights>> LoadAllRanks(const Checkpoint& checkpoint, const LoadOptions& options,
                                                 const std::vector<Shard>& shards, const std::vector<int>& gpus) {
  std::vector<StatusOr<LlamaWeights>> loaded;
  std::vector<LoadOptions> each(shards.size(), options);
  for (size_t rank = 0; rank < each.size(); ++rank) {
    each[rank].shard = shards[rank];
    if (options.device == Device::kCuda) each[rank].gpu = gpus.at(rank);
    each[rank].readers = std::max(1, options.readers / static_cast<int>(shards.size()));
    loaded.emplace_back(Status(Code::kInternal, "not loaded"));
  }
  const auto start = std::chrono::steady_clock::now();
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<LoadProgress> progress(each.size());  // guarded by mutex, as is `running`
  size_t running = each.size();
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < each.size(); ++rank) {
    each[rank].progress = [&, rank](const LoadProgress& of_rank) {
      if (options.progress_of_shard) options.progress_of_shard(rank, of_rank);
      std::lock_guard lock(mutex);
      progress[rank] = of_rank;
    };
    each[rank].cancelled = [&] { return stop.load(); };
    threads.emplace_back([&, rank] {
      loaded[rank] = LoadWeights(checkpoint, each[rank]);
      if (!loaded[rank].ok()) stop = true;
      std::lock_guard lock(mutex);
      if (--running == 0) changed.notify_all();
    });
  }
  auto report = [&] {  // under mutex
    if (!options.progress) return;
    LoadProgress total;
    for (const LoadProgress& of_rank : progress) {
      total.bytes_done += of_rank.bytes_done;
      total.bytes_total += of_rank.bytes_total;
    }
    total.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    options.progress(total);
  };
  {
    std::unique_lock lock(mutex);
    while (!changed.wait_for(lock, std::chrono::milliseconds(100), [&] { return running == 0; })) {
      if (options.cancelled && options.cancelled()) stop = true;
      report();
    }
    report();
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<LlamaWeights> weights;
  // A rank that failed made the others stop: its error is the one to tell.
  for (const auto& rank : loaded) {
    if (!rank.ok() && rank.status().code() != Code::kCancelled) return rank.status();
  }
  for (auto& rank : loaded) {
    RETURN_IF_ERROR(rank.status());
    weights.push_back(std::move(rank).value());
  }
  return weights;
}

}  // namespace altiplano

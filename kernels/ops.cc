// The door: checks what ops.h says of shapes, dtypes and devices, then goes to the twin of the stream's device.
#include "kernels/ops.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "kernels/cpu/ops.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/sample_plan.h"

namespace altiplano {

namespace {

// A mismatch is a bug of the model's, never a caller's doing.
#define DOOR_CHECK(condition)      \
  do {                             \
    if (!(condition)) [[unlikely]] \
      Die(op, #condition);         \
  } while (false)

[[noreturn]] void Die(const char* op, const char* condition) {
  std::fprintf(stderr, "%s: broken argument: %s\n", op, condition);
  std::abort();
}

bool IsAct(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16;
}
bool IsF32Or(DType dtype, DType act) {
  return dtype == DType::kF32 || dtype == act;
}

// Every view lies on the stream's device and has the shape that its comment in ops.h gives it. -1: any.
struct Expected {
  const char* name;
  const TensorView& view;
  std::initializer_list<int64_t> shape;
};

void CheckViews(const char* op, Device device, std::initializer_list<Expected> views) {
  for (const Expected& expected : views) {
    const TensorView& view = expected.view;
    bool good = view.device == device && view.rank == static_cast<int>(expected.shape.size());
    int i = 0;
    for (int64_t n : expected.shape) {
      if (!good) break;
      good = view.dim(i) >= 0 && (n < 0 || view.dim(i) == n);
      ++i;
    }
    // Rows may lie apart in a matrix; vectors and pools are dense, and rows never overlap.
    int64_t inner = 1;
    for (int j = 1; good && j < view.rank; ++j) inner *= view.dim(j);
    if (good && view.rank == 2 && view.dim(0) > 1) good = view.stride0 >= inner;
    if (good && view.rank != 2) good = view.contiguous();
    if (good && view.elements() > 0) good = view.data != nullptr;
    if (good) continue;
    std::fprintf(stderr, "%s: broken argument: %s is %s on %s, [", op, expected.name, Name(view.dtype),
                 view.device == Device::kCpu ? "the CPU" : "a GPU");
    for (int j = 0; j < view.rank; ++j)
      std::fprintf(stderr, "%s%lld", j ? ", " : "", static_cast<long long>(view.dim(j)));
    std::fputs("], expected [", stderr);
    int j = 0;
    for (int64_t n : expected.shape) std::fprintf(stderr, "%s%lld", j++ ? ", " : "", static_cast<long long>(n));
    std::fputs("]\n", stderr);
    std::abort();
  }
}

bool OnCuda(const Stream& stream) {
  return stream.device() == Device::kCuda;
}

}  // namespace

void Embed(Stream& stream, const EmbedArgs& args) {
  static constexpr char op[] = "Embed";
  const int64_t tokens = args.ids.dim(0), hidden = args.table.dim(1);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, hidden}}, {"table", args.table, {-1, hidden}}, {"ids", args.ids, {tokens}}});
  DOOR_CHECK(IsAct(args.table.dtype));
  DOOR_CHECK(IsF32Or(args.out.dtype, args.table.dtype));
  DOOR_CHECK(args.ids.dtype == DType::kI32);
  if (!args.sampled.empty()) {
    CheckViews(op, stream.device(), {{"sampled", args.sampled, {-1}}});
    DOOR_CHECK(args.sampled.dtype == DType::kI32);
  }
  if (tokens == 0) return;
  OnCuda(stream) ? cuda::Embed(stream, args) : cpu::Embed(stream.team(), args);
}

void RmsNorm(Stream& stream, const RmsNormArgs& args) {
  static constexpr char op[] = "RmsNorm";
  const int64_t tokens = args.x.dim(0), hidden = args.x.dim(1);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, hidden}}, {"x", args.x, {tokens, hidden}}, {"weight", args.weight, {hidden}}});
  DOOR_CHECK(IsAct(args.out.dtype));
  DOOR_CHECK(IsAct(args.x.dtype));
  DOOR_CHECK(IsAct(args.weight.dtype));
  if (tokens == 0) return;
  OnCuda(stream) ? cuda::RmsNorm(stream, args) : cpu::RmsNorm(stream.team(), args);
}

void AddRmsNorm(Stream& stream, const AddRmsNormArgs& args) {
  static constexpr char op[] = "AddRmsNorm";
  const int64_t tokens = args.x.dim(0), hidden = args.x.dim(1);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, hidden}},
              {"residual", args.residual, {tokens, hidden}},
              {"x", args.x, {tokens, hidden}},
              {"weight", args.weight, {hidden}}});
  DOOR_CHECK(IsAct(args.out.dtype));
  DOOR_CHECK(IsAct(args.residual.dtype));
  DOOR_CHECK(IsAct(args.x.dtype));
  DOOR_CHECK(IsAct(args.weight.dtype));
  if (tokens == 0) return;
  OnCuda(stream) ? cuda::AddRmsNorm(stream, args) : cpu::AddRmsNorm(stream.team(), args);
}

void Linear(Stream& stream, const LinearArgs& args) {
  static constexpr char op[] = "Linear";
  const int64_t tokens = args.x.dim(0), k = args.x.dim(1), n = args.weight.dim(0);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, n}}, {"x", args.x, {tokens, k}}, {"weight", args.weight, {n, k}}});
  DOOR_CHECK(IsAct(args.weight.dtype));
  DOOR_CHECK(args.x.dtype == args.weight.dtype);
  DOOR_CHECK(IsF32Or(args.out.dtype, args.weight.dtype));
  DOOR_CHECK(k > 0);
  DOOR_CHECK(args.out.data != args.x.data || tokens == 0);
  if (tokens == 0 || n == 0) return;
  OnCuda(stream) ? cuda::Linear(stream, args) : cpu::Linear(stream.team(), args);
}

void PrepareLinear(Stream& stream, void* scratch) {
  if (stream.device() == Device::kCuda) cuda::PrepareLinear(stream, scratch);
}

void SiluMul(Stream& stream, const SiluMulArgs& args) {
  static constexpr char op[] = "SiluMul";
  const int64_t tokens = args.out.dim(0), ffn = args.out.dim(1);
  CheckViews(op, stream.device(), {{"out", args.out, {tokens, ffn}}, {"gate_up", args.gate_up, {tokens, 2 * ffn}}});
  DOOR_CHECK(IsAct(args.out.dtype));
  DOOR_CHECK(IsF32Or(args.gate_up.dtype, args.out.dtype));
  if (tokens == 0) return;
  OnCuda(stream) ? cuda::SiluMul(stream, args) : cpu::SiluMul(stream.team(), args);
}

void LinearSiluMul(Stream& stream, const LinearSiluMulArgs& args) {
  static constexpr char op[] = "LinearSiluMul";
  const int64_t tokens = args.x.dim(0), k = args.x.dim(1), ffn = args.out.dim(1);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, ffn}},
              {"x", args.x, {tokens, k}},
              {"weight", args.weight, {2 * ffn, k}},
              {"gate_up", args.gate_up, {tokens, 2 * ffn}}});
  DOOR_CHECK(IsAct(args.weight.dtype));
  DOOR_CHECK(args.x.dtype == args.weight.dtype);
  DOOR_CHECK(args.out.dtype == args.weight.dtype);
  DOOR_CHECK(args.gate_up.dtype == args.weight.dtype);
  DOOR_CHECK(k > 0);
  DOOR_CHECK(args.out.data != args.x.data || tokens == 0);
  if (tokens == 0 || ffn == 0) return;
  if (OnCuda(stream)) {
    cuda::LinearSiluMul(stream, args);
  } else {
    cpu::Linear(stream.team(), {.out = args.gate_up, .x = args.x, .weight = args.weight});
    cpu::SiluMul(stream.team(), {.out = args.out, .gate_up = args.gate_up});
  }
}

void RopeStoreKv(Stream& stream, const RopeStoreKvArgs& args) {
  static constexpr char op[] = "RopeStoreKv";
  const int64_t tokens = args.positions.dim(0), pages = args.k_pages.dim(0), kv_heads = args.k_pages.dim(1);
  const int64_t page_size = args.k_pages.dim(2), dim = args.k_pages.dim(3);
  CheckViews(op, stream.device(),
             {{"q", args.q, {tokens, -1}},
              {"k", args.k, {tokens, kv_heads * dim}},
              {"v", args.v, {tokens, kv_heads * dim}},
              {"k_pages", args.k_pages, {pages, kv_heads, page_size, dim}},
              {"v_pages", args.v_pages, {pages, kv_heads, page_size, dim}},
              {"positions", args.positions, {tokens}},
              {"slots", args.slots, {tokens}},
              {"inv_freq", args.inv_freq, {dim / 2}}});
  const DType act = args.k_pages.dtype;
  DOOR_CHECK(dim > 0 && dim % 2 == 0 && page_size > 0);
  DOOR_CHECK(args.q.dim(1) % dim == 0);
  DOOR_CHECK(IsAct(act));
  DOOR_CHECK(args.v_pages.dtype == act);
  DOOR_CHECK(IsF32Or(args.q.dtype, act));
  DOOR_CHECK(IsF32Or(args.k.dtype, act));
  DOOR_CHECK(IsF32Or(args.v.dtype, act));
  DOOR_CHECK(args.positions.dtype == DType::kI32);
  DOOR_CHECK(args.slots.dtype == DType::kI32);
  DOOR_CHECK(args.inv_freq.dtype == DType::kF32);
  if (tokens == 0) return;
  OnCuda(stream) ? cuda::RopeStoreKv(stream, args) : cpu::RopeStoreKv(stream.team(), args);
}

void PagedAttention(Stream& stream, const PagedAttentionArgs& args) {
  static constexpr char op[] = "PagedAttention";
  const int64_t tokens = args.q.dim(0), width = args.q.dim(1), sequences = args.context_lengths.dim(0);
  const int64_t pages = args.k_pages.dim(0), kv_heads = args.k_pages.dim(1);
  const int64_t page_size = args.k_pages.dim(2), dim = args.k_pages.dim(3);
  CheckViews(op, stream.device(),
             {{"out", args.out, {tokens, width}},
              {"q", args.q, {tokens, width}},
              {"k_pages", args.k_pages, {pages, kv_heads, page_size, dim}},
              {"v_pages", args.v_pages, {pages, kv_heads, page_size, dim}},
              {"q_begin", args.q_begin, {sequences + 1}},
              {"context_lengths", args.context_lengths, {sequences}},
              {"block_tables", args.block_tables, {sequences, -1}}});
  const DType act = args.k_pages.dtype;
  DOOR_CHECK(kv_heads > 0 && dim > 0 && page_size > 0);
  DOOR_CHECK(width % (kv_heads * dim) == 0);
  DOOR_CHECK(IsAct(act));
  DOOR_CHECK(args.v_pages.dtype == act);
  DOOR_CHECK(args.out.dtype == act);
  DOOR_CHECK(IsF32Or(args.q.dtype, act));
  DOOR_CHECK(args.q_begin.dtype == DType::kI32);
  DOOR_CHECK(args.context_lengths.dtype == DType::kI32);
  DOOR_CHECK(args.block_tables.dtype == DType::kI32);
  if (tokens == 0 || sequences == 0) return;
  if (OnCuda(stream)) CheckViews(op, stream.device(), {{"work.list", args.work.list, {-1}}});
  OnCuda(stream) ? cuda::PagedAttention(stream, args) : cpu::PagedAttention(stream.team(), args);
}

void GatherRows(Stream& stream, const GatherRowsArgs& args) {
  static constexpr char op[] = "GatherRows";
  const int64_t rows = args.rows.dim(0), hidden = args.x.dim(1);
  CheckViews(op, stream.device(),
             {{"out", args.out, {rows, hidden}}, {"x", args.x, {-1, hidden}}, {"rows", args.rows, {rows}}});
  DOOR_CHECK(args.out.dtype == args.x.dtype);
  DOOR_CHECK(args.rows.dtype == DType::kI32);
  if (rows == 0) return;
  OnCuda(stream) ? cuda::GatherRows(stream, args) : cpu::GatherRows(stream.team(), args);
}

size_t SampleScratchBytes(int64_t rows, int64_t vocab, Device device) {
  return device == Device::kCuda ? cuda::SampleScratchBytes(rows, vocab) : cpu::SampleScratchBytes(rows, vocab);
}

void Sample(Stream& stream, const SampleArgs& args) {
  static constexpr char op[] = "Sample";
  const int64_t rows = args.logits.dim(0), vocab = args.logits.dim(1);
  CheckViews(op, stream.device(), {{"logits", args.logits, {rows, vocab}}});
  DOOR_CHECK(args.logits.dtype == DType::kF32);
  DOOR_CHECK(vocab > 0 && vocab <= kMostVocabulary);
  if (!args.tokens.empty()) {
    CheckViews(op, stream.device(), {{"tokens", args.tokens, {rows}}});
    DOOR_CHECK(args.tokens.dtype == DType::kI32);
  }
  DOOR_CHECK(rows == 0 || (args.results != nullptr && args.params != nullptr));
  DOOR_CHECK(args.scratch != nullptr || SampleScratchBytes(rows, vocab, stream.device()) == 0);
  if (rows == 0) return;
  OnCuda(stream) ? cuda::Sample(stream, args) : cpu::Sample(stream.team(), args);
}

void Score(Stream& stream, const ScoreArgs& args) {
  static constexpr char op[] = "Score";
  const int64_t rows = args.logits.dim(0);
  CheckViews(op, stream.device(), {{"logits", args.logits, {rows, -1}}});
  DOOR_CHECK(args.logits.dtype == DType::kF32);
  DOOR_CHECK(args.logits.dim(1) > 0);
  DOOR_CHECK(rows == 0 || (args.results != nullptr && args.num_top != nullptr));
  DOOR_CHECK(args.scratch != nullptr || SampleScratchBytes(rows, args.logits.dim(1), stream.device()) == 0);
  if (rows == 0) return;
  OnCuda(stream) ? cuda::Score(stream, args) : cpu::Score(stream.team(), args);
}

}  // namespace altiplano

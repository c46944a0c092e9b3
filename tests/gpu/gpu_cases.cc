#include "tests/gpu/gpu_cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "kernels/cuda/attention_scratch.h"
#include "kernels/cuda/backend.h"
#include "kernels/ops.h"
#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/model/config.h"

namespace altiplano::gpu {

namespace {

constexpr int64_t kPageSize = 64;
constexpr const char* kInvariant = ", batch-invariant";

// One rank's part of a model.
struct Rank {
  std::string name;
  int64_t hidden, q_heads, kv_heads, dim, ffn, vocab;
};

Rank RankOf(const std::string& model, int64_t ranks) {
  const ModelConfig c = PublishedModelConfig(model).value();
  return {.name = ranks == 1 ? model : StrCat(model, " of ", ranks),
          .hidden = c.hidden,
          .q_heads = c.q_heads / ranks,
          .kv_heads = std::max<int64_t>(1, c.kv_heads / ranks),
          .dim = c.head_dim,
          .ffn = c.ffn / ranks,
          .vocab = c.vocab / ranks};
}

double Double(int64_t n) {
  return static_cast<double>(n);
}

// How many places a call that chooses where it reads `bytes` takes in turn, so that L2, of up to 60 MB, has none of
// them when it comes round again.
constexpr int64_t PlacesToRead(int64_t bytes) {
  return std::clamp<int64_t>((int64_t{256} << 20) / bytes, 4, 256);
}
static_assert(PlacesToRead(4 << 20) == 64);  // one sequence of 1024 tokens of 8B
static_assert(PlacesToRead(8192) == 256);    // a row: where launches are all there is to measure
static_assert(PlacesToRead(1 << 30) == 4);

Case LinearCase(const Rank& rank, const std::string& what, int64_t m, int64_t n, int64_t k, DType out,
                bool batch_invariant = false) {
  Case c;
  c.part = batch_invariant ? "linear_invariant" : "linear";
  c.name = StrCat("Linear ", rank.name, " ", what, ", ", m, " tokens", batch_invariant ? kInvariant : "");
  c.sizes = {{"m", m}, {"n", n}, {"k", k}};
  c.bytes = 2 * (Double(n * k) + Double(m * k)) + static_cast<double>(SizeOf(out)) * Double(m * n);
  c.flops = 2 * Double(m) * Double(n) * Double(k);
  c.prepare = [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      Linear(stream, {.out = arena.Output(turn, m, n, out),
                      .x = arena.Input(2 * turn, m, k, DType::kBF16),
                      .weight = arena.Input(2 * turn + 1, n, k, DType::kBF16),
                      .batch_invariant = batch_invariant,
                      .scratch = arena.linear_scratch()});
    };
  };
  return c;
}

// The plain kernel, for f32.
Case PlainLinearCase(int64_t m, int64_t n, int64_t k) {
  Case c;
  c.part = "plain";
  c.name = StrCat("Linear f32, ", n, " x ", k, ", ", m, " tokens");
  c.sizes = {{"m", m}, {"n", n}, {"k", k}};
  c.bytes = 4 * (Double(n * k) + Double(m * k) + Double(m * n));
  c.flops = 2 * Double(m) * Double(n) * Double(k);
  c.prepare = [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      Linear(stream, {.out = arena.Output(turn, m, n, DType::kF32),
                      .x = arena.Input(2 * turn, m, k, DType::kF32),
                      .weight = arena.Input(2 * turn + 1, n, k, DType::kF32),
                      .batch_invariant = true});
    };
  };
  return c;
}

// The product of gate and up with SiLU in it.
Case LinearSiluMulCase(const Rank& rank, int64_t m, bool batch_invariant) {
  const int64_t ffn = rank.ffn, k = rank.hidden;
  Case c;
  c.part = batch_invariant ? "linear_invariant" : "linear";
  c.name = StrCat("LinearSiluMul ", rank.name, ", ", m, " tokens", batch_invariant ? kInvariant : "");
  c.sizes = {{"m", m}, {"n", 2 * ffn}, {"k", k}};
  c.bytes = 2 * (Double(2 * ffn * k) + Double(m * k) + Double(m * ffn));
  c.flops = 2 * Double(m) * Double(2 * ffn) * Double(k);
  c.prepare = [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      LinearSiluMul(stream, {.out = arena.Output(2 * turn, m, ffn, DType::kBF16),
                             .x = arena.Input(2 * turn, m, k, DType::kBF16),
                             .weight = arena.Input(2 * turn + 1, 2 * ffn, k, DType::kBF16),
                             .gate_up = arena.Output(2 * turn + 1, m, 2 * ffn, DType::kBF16),
                             .batch_invariant = batch_invariant,
                             .scratch = arena.linear_scratch()});
    };
  };
  return c;
}

// Our own kernels for any number of tokens, where cuBLASLt or that for Hopper has taken the others.
void AddInvariantLinear(const Rank& r, const std::vector<int64_t>& tokens, std::vector<Case>* cases) {
  for (int64_t m : tokens) {
    cases->push_back(LinearCase(r, "qkv", m, (r.q_heads + 2 * r.kv_heads) * r.dim, r.hidden, DType::kBF16, true));
    cases->push_back(LinearCase(r, "down", m, r.hidden, r.ffn, DType::kF32, true));
    cases->push_back(LinearSiluMulCase(r, m, true));
  }
}

void AddLinear(const Rank& r, const std::vector<int64_t>& tokens, std::vector<Case>* cases) {
  for (int64_t m : tokens) {
    cases->push_back(LinearCase(r, "qkv", m, (r.q_heads + 2 * r.kv_heads) * r.dim, r.hidden, DType::kBF16));
    cases->push_back(LinearCase(r, "o", m, r.hidden, r.q_heads * r.dim, DType::kF32));
    cases->push_back(LinearCase(r, "gate_up", m, 2 * r.ffn, r.hidden, DType::kBF16));
    cases->push_back(LinearSiluMulCase(r, m, false));
    cases->push_back(LinearCase(r, "down", m, r.hidden, r.ffn, DType::kF32));
    if (m <= 256) cases->push_back(LinearCase(r, "head", m, r.vocab, r.hidden, DType::kF32));
  }
}

// The new tokens of a sequence, and all of them.
struct Lengths {
  int64_t queries, context;
};
int64_t PagesOf(const Lengths& sequence) {
  return (sequence.context + kPageSize - 1) / kPageSize;
}

// One step of sequences of any lengths.
Case AttentionCase(const Rank& r, const std::string& part, const std::string& what, const std::vector<Lengths>& step,
                   DType act = DType::kBF16) {
  Case c;
  c.part = part;
  c.name = StrCat("PagedAttention ", r.name, ", ", what);
  const auto sequences = static_cast<int64_t>(step.size());
  c.sizes = {{"sequences", sequences}, {"q_heads", r.q_heads}, {"kv_heads", r.kv_heads}, {"dim", r.dim}};
  std::vector<int32_t> q_begin = {0}, lengths;
  int64_t tokens = 0, keys = 0, most_pages = 0, all_pages = 0;
  for (const auto& [queries, context] : step) {
    tokens += queries;
    keys += context;
    most_pages = std::max(most_pages, PagesOf({queries, context}));
    all_pages += PagesOf({queries, context});
    q_begin.push_back(static_cast<int32_t>(tokens));
    lengths.push_back(static_cast<int32_t>(context));
    c.flops += 4 * Double(r.q_heads * r.dim) *
               (Double(queries) * Double(context - queries) + Double(queries) * Double(queries + 1) / 2);
  }
  c.bytes =
      2 * static_cast<double>(SizeOf(act)) * (Double(keys * r.kv_heads * r.dim) + Double(tokens * r.q_heads * r.dim));
  c.prepare = [=](Arena& arena) {
    const TensorView k_pages = arena.InputPool(0, r.kv_heads, kPageSize, r.dim, act);
    const TensorView v_pages = arena.InputPool(1, r.kv_heads, kPageSize, r.dim, act);
    CHECK(k_pages.dim(0) >= all_pages);
    const TensorView begins = arena.Keep(q_begin, {sequences + 1}), contexts = arena.Keep(lengths, {sequences});
    std::vector<int32_t> pages(static_cast<size_t>(k_pages.dim(0)));
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
    std::mt19937 random(1);
    std::vector<TensorView> tables;
    const int64_t kv_bytes = 2 * keys * r.kv_heads * r.dim * static_cast<int64_t>(SizeOf(act));
    for (int64_t i = 0; i < PlacesToRead(kv_bytes); ++i) {
      std::shuffle(pages.begin(), pages.end(), random);
      std::vector<int32_t> table;
      auto next = pages.begin();
      for (const Lengths& sequence : step) {
        table.insert(table.end(), next, next + PagesOf(sequence));
        next += PagesOf(sequence);
        table.resize(table.size() + static_cast<size_t>(most_pages - PagesOf(sequence)));
      }
      tables.push_back(arena.Keep(table, {sequences, most_pages}));
    }
    auto scratch = std::make_shared<Buffer>(Buffer::Allocate(Device::kCuda, cuda::kMostAttentionScratch));
    CHECK(static_cast<bool>(*scratch));
    const cuda::AttentionSizes sizes = {
        .q_heads = r.q_heads,
        .kv_heads = r.kv_heads,
        .dim = r.dim,
        .may_prefill = cuda::TakesPrefill(*arena.gpu().architecture, act, r.dim, kPageSize),
        .scratch_bytes = scratch->bytes(),
        .multiprocessors = arena.gpu().multiprocessors};
    std::vector<int32_t> list(static_cast<size_t>(cuda::AttentionListWords(sizes, tokens, sequences)));
    AttentionWork work = cuda::PlanAttention(sizes, q_begin.data(), lengths.data(), sequences, tokens, list.data());
    list.resize(static_cast<size_t>(work.list.elements()));
    work.list = arena.Keep(list, {work.list.elements()});
    return [=, &arena](Stream& stream, int turn) {
      const int64_t width = r.q_heads * r.dim;
      PagedAttention(stream, {.out = arena.Output(turn, tokens, width, act),
                              .q = arena.Input(turn, tokens, width, act),
                              .k_pages = k_pages,
                              .v_pages = v_pages,
                              .q_begin = begins,
                              .context_lengths = contexts,
                              .block_tables = tables[static_cast<size_t>(turn) % tables.size()],
                              .scale = 1 / std::sqrt(static_cast<float>(r.dim)),
                              .work = work,
                              .scratch = scratch->data(),
                              .scratch_bytes = scratch->bytes()});
    };
  };
  return c;
}

// Sequences of `context` tokens each, of which the last `queries` are new.
Case AttentionCase(const Rank& r, int64_t sequences, int64_t queries, int64_t context) {
  Case c = AttentionCase(r, queries == 1 ? "decode_attention" : "prefill_attention",
                         StrCat(sequences, " x ", queries, " of ", context),
                         std::vector<Lengths>(static_cast<size_t>(sequences), {queries, context}));
  c.sizes["queries"] = queries;
  c.sizes["context"] = context;
  return c;
}

// Contexts from 128 to 32768, evenly by their logarithm, in no order: what one work list for any mix of lengths is for.
std::vector<Lengths> MixedDecodes(int64_t sequences) {
  std::vector<Lengths> step;
  for (int64_t i = 0; i < sequences; ++i) {
    const double at = Double(i * 13 % sequences) / Double(sequences - 1);
    step.push_back({1, static_cast<int64_t>(std::lround(128 * std::exp2(8 * at)))});
  }
  return step;
}

// Choices of `count` of `rows` rows, in no order.
std::vector<TensorView> RandomRows(Arena& arena, int64_t count, int64_t rows, int64_t row_bytes) {
  std::mt19937 random(1);
  std::vector<TensorView> choices;
  for (int64_t i = 0; i < PlacesToRead(count * row_bytes); ++i) {
    std::vector<int32_t> chosen;
    for (int64_t n = 0; n < count; ++n) chosen.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(rows)));
    choices.push_back(arena.Keep(chosen, {count}));
  }
  return choices;
}

void AddRowOps(const Rank& r, int64_t tokens, std::vector<Case>* cases) {
  const auto add = [&](std::string op, std::map<std::string, int64_t> sizes, double bytes, auto prepare) {
    Case c;
    c.part = "row_ops";
    c.name = StrCat(op, " ", r.name, ", ", tokens, " tokens");
    sizes["tokens"] = tokens;
    c.sizes = std::move(sizes);
    c.bytes = bytes;
    c.prepare = std::move(prepare);
    cases->push_back(std::move(c));
  };
  const int64_t hidden = r.hidden, ffn = r.ffn, q = r.q_heads * r.dim, kv = r.kv_heads * r.dim, dim = r.dim;
  add("Embed", {{"hidden", hidden}}, Double(tokens * hidden) * (2 + 4), [=](Arena& arena) {
    // The table is all that there is to read: rows far apart, in no order, each turn others.
    const int64_t vocab = static_cast<int64_t>(Arena::kInputBytes) / (2 * hidden);
    const auto ids = RandomRows(arena, tokens, vocab, 2 * hidden);
    return [=, &arena](Stream& stream, int turn) {
      Embed(stream, {.out = arena.Output(turn, tokens, hidden, DType::kF32),
                     .table = arena.Input(0, vocab, hidden, DType::kBF16),
                     .ids = ids[static_cast<size_t>(turn) % ids.size()]});
    };
  });
  add("GatherRows", {{"hidden", hidden}}, Double(tokens * hidden) * (4 + 4), [=](Arena& arena) {
    const int64_t all = static_cast<int64_t>(Arena::kInputBytes) / (4 * hidden);
    const auto rows = RandomRows(arena, tokens, all, 4 * hidden);
    return [=, &arena](Stream& stream, int turn) {
      GatherRows(stream, {.out = arena.Output(turn, tokens, hidden, DType::kF32),
                          .x = arena.Input(0, all, hidden, DType::kF32),
                          .rows = rows[static_cast<size_t>(turn) % rows.size()]});
    };
  });
  add("RmsNorm", {{"hidden", hidden}}, Double(tokens * hidden) * (4 + 2), [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      const TensorView row = arena.Input(2 * turn + 1, 1, hidden, DType::kF32);
      RmsNorm(stream, {.out = arena.Output(turn, tokens, hidden, DType::kBF16),
                       .x = arena.Input(2 * turn, tokens, hidden, DType::kF32),
                       .weight = TensorView::Make(row.data, DType::kF32, {hidden}, Device::kCuda),
                       .eps = 1e-5f});
    };
  });
  add("AddRmsNorm", {{"hidden", hidden}}, Double(tokens * hidden) * (4 + 4 + 4 + 2), [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      const TensorView row = arena.Input(2 * turn + 1, 1, hidden, DType::kF32);
      AddRmsNorm(stream, {.out = arena.Output(2 * turn, tokens, hidden, DType::kBF16),
                          .residual = arena.Output(2 * turn + 1, tokens, hidden, DType::kF32),
                          .x = arena.Input(2 * turn, tokens, hidden, DType::kF32),
                          .weight = TensorView::Make(row.data, DType::kF32, {hidden}, Device::kCuda),
                          .eps = 1e-5f});
    };
  });
  add("SiluMul", {{"ffn", ffn}}, Double(tokens * ffn) * 6, [=](Arena& arena) {
    return [=, &arena](Stream& stream, int turn) {
      SiluMul(stream, {.out = arena.Output(turn, tokens, ffn, DType::kBF16),
                       .gate_up = arena.Input(turn, tokens, 2 * ffn, DType::kBF16)});
    };
  });
  add("RopeStoreKv", {{"q", q}, {"kv", kv}, {"dim", dim}}, Double(tokens) * Double(4 * q + 8 * kv), [=](Arena& arena) {
    const TensorView k_pages = arena.OutputPool(0, kv / dim, kPageSize, dim, DType::kBF16);
    const TensorView v_pages = arena.OutputPool(1, kv / dim, kPageSize, dim, DType::kBF16);
    // A prime step goes through the pool before it meets a slot again.
    std::vector<int32_t> positions, slots;
    for (int64_t t = 0; t < tokens; ++t) {
      positions.push_back(static_cast<int32_t>(t));
      slots.push_back(static_cast<int32_t>(t * 104729 % (k_pages.dim(0) * kPageSize)));
    }
    const TensorView at = arena.Keep(positions, {tokens}), to = arena.Keep(slots, {tokens});
    return [=, &arena](Stream& stream, int turn) {
      const TensorView qkv = arena.Output(turn, tokens, q + 2 * kv, DType::kBF16);
      const TensorView row = arena.Input(turn, 1, dim / 2, DType::kF32);
      RopeStoreKv(stream, {.q = qkv.columns(0, q),
                           .k = qkv.columns(q, kv),
                           .v = qkv.columns(q + kv, kv),
                           .k_pages = k_pages,
                           .v_pages = v_pages,
                           .positions = at,
                           .slots = to,
                           .inv_freq = TensorView::Make(row.data, DType::kF32, {dim / 2}, Device::kCuda)});
    };
  });
}

struct Sampling {
  const char* name;
  SampleParams params;
  bool statistics = false;  // penalties need those of the sequence
};

Case ScoreCase(int64_t rows) {
  constexpr int64_t kVocab = 128256;
  Case c;
  c.part = "sample";
  c.name = StrCat("Score, ", rows, " rows");
  c.sizes = {{"rows", rows}, {"vocab", kVocab}};
  c.bytes = Double(rows * kVocab) * 4;
  c.captured = false;
  c.prepare = [=](Arena& arena) {
    auto memory = std::make_shared<Buffer>(arena.Pinned(static_cast<size_t>(rows) * sizeof(SampleResult)));
    CHECK(static_cast<bool>(*memory));
    auto* const results = static_cast<SampleResult*>(memory->data());
    for (int64_t i = 0; i < rows; ++i) results[i].token = 7;
    auto num_top = std::make_shared<std::vector<int32_t>>(static_cast<size_t>(rows), 0);
    auto scratch =
        std::make_shared<Buffer>(Buffer::Allocate(Device::kCuda, SampleScratchBytes(rows, kVocab, Device::kCuda)));
    CHECK(static_cast<bool>(*scratch));
    return [=, &arena](Stream& stream, int turn) {
      Score(stream, {.results = static_cast<SampleResult*>(memory->data()),
                     .num_top = num_top->data(),
                     .logits = arena.Input(turn, rows, kVocab, DType::kF32),
                     .scratch = scratch->data()});
    };
  };
  return c;
}

Case SampleCase(int64_t rows, const Sampling& sampling) {
  constexpr int64_t kVocab = 128256;
  Case c;
  c.part = "sample";
  c.name = StrCat("Sample ", sampling.name, ", ", rows, " rows");
  c.sizes = {{"rows", rows}, {"vocab", kVocab}};
  c.bytes = Double(rows * kVocab) * 4;
  c.captured = false;  // as in the engine
  c.prepare = [=](Arena& arena) {
    auto params = std::make_shared<std::vector<SampleParams>>(static_cast<size_t>(rows), sampling.params);
    auto results = std::make_shared<Buffer>(arena.Pinned(static_cast<size_t>(rows) * sizeof(SampleResult)));
    CHECK(static_cast<bool>(*results));
    if (sampling.statistics) {  // one sequence's stands for all
      const TensorView counts = arena.Keep(std::vector<int32_t>(kVocab / 2), {kVocab / 2});
      const TensorView prompt = arena.Keep(std::vector<int32_t>(kVocab / 4), {kVocab / 4});
      for (SampleParams& each : *params) {
        each.output_counts = static_cast<const uint16_t*>(counts.data);
        each.in_prompt = static_cast<const uint8_t*>(prompt.data);
      }
    }
    auto scratch =
        std::make_shared<Buffer>(Buffer::Allocate(Device::kCuda, SampleScratchBytes(rows, kVocab, Device::kCuda)));
    CHECK(static_cast<bool>(*scratch));
    return [=, &arena](Stream& stream, int turn) {
      Sample(stream, {.results = static_cast<SampleResult*>(results->data()),
                      .params = params->data(),
                      .logits = arena.Input(turn, rows, kVocab, DType::kF32),
                      .scratch = scratch->data()});
    };
  };
  return c;
}

}  // namespace

Arena::Arena(Stream& stream)
    : stream_(stream),
      inputs_(Buffer::Allocate(Device::kCuda, kInputBytes)),
      outputs_(Buffer::Allocate(Device::kCuda, kOutputBytes)),
      linear_scratch_(Buffer::Allocate(Device::kCuda, kLinearScratchBytes)) {
  if (!*this) return;
  PrepareLinear(stream_, linear_scratch());
  // Numbers around 2^-7 of either sign, as bf16 and (two of them in one) as f32.
  std::vector<uint32_t> block(size_t{16} << 20);
  std::minstd_rand random(1);
  for (uint32_t& word : block) {
    const auto bits = static_cast<uint32_t>(random());
    word = 0x3c003c00 | (bits & 0x01ff01ff) | ((bits & 0x01000100) << 7);
  }
  const size_t step = block.size() * sizeof(uint32_t);
  for (const Buffer* memory : {&inputs_, &outputs_}) {
    for (size_t at = 0; at < memory->bytes(); at += step) {
      Copy(stream_, static_cast<char*>(memory->data()) + at, Device::kCuda, block.data(), Device::kCpu,
           std::min(step, memory->bytes() - at));
    }
  }
  CHECK(stream_.Synchronize().empty());
}

TensorView Arena::Piece(const Buffer& memory, int turn, int64_t rows, int64_t columns, DType dtype) {
  const size_t bytes = (static_cast<size_t>(rows * columns) * SizeOf(dtype) + 1023) / 1024 * 1024;
  CHECK(bytes <= memory.bytes());
  // Steps of a third of the memory and a little: neighbours in time lie far apart, and places do not repeat soon.
  const size_t room = memory.bytes() - bytes, step = memory.bytes() / 3 + (size_t{37} << 20);
  const size_t at = room == 0 ? 0 : static_cast<size_t>(turn) * step % room / 1024 * 1024;
  return TensorView::Make(static_cast<char*>(memory.data()) + at, dtype, {rows, columns}, Device::kCuda);
}

TensorView Arena::Pool(const Buffer& memory, int which, int64_t heads, int64_t page_size, int64_t dim, DType dtype) {
  const size_t half = memory.bytes() / 2, page = static_cast<size_t>(heads * page_size * dim) * SizeOf(dtype);
  return TensorView::Make(static_cast<char*>(memory.data()) + static_cast<size_t>(which) * half, dtype,
                          {static_cast<int64_t>(half / page), heads, page_size, dim}, Device::kCuda);
}

TensorView Arena::Keep(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape) {
  const size_t bytes = values.size() * sizeof(int32_t);
  kept_.push_back(Buffer::Allocate(Device::kCuda, bytes));
  CHECK(static_cast<bool>(kept_.back()));
  Copy(stream_, kept_.back().data(), Device::kCuda, values.data(), Device::kCpu, bytes);
  CHECK(stream_.Synchronize().empty());
  return TensorView::Make(kept_.back().data(), DType::kI32, shape, Device::kCuda);
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  const Rank whole = RankOf("8b", 1);
  const std::vector<Rank> eighths = {RankOf("8b", 8), RankOf("70b", 8), RankOf("405b", 8)};
  AddLinear(whole, {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192}, &cases);
  for (const Rank& rank : eighths) AddLinear(rank, {1, 4, 8, 16, 32, 64, 512, 2048}, &cases);
  AddInvariantLinear(whole, {16, 32, 64, 128, 256, 512, 2048, 8192}, &cases);
  for (const Rank& rank : eighths) AddInvariantLinear(rank, {16, 32, 64}, &cases);
  for (int64_t context : {1024, 4096, 32768}) {
    for (int64_t sequences : {1, 8, 32, 128}) {
      if (sequences * context <= 128 * 4096) cases.push_back(AttentionCase(whole, sequences, 1, context));
    }
  }
  cases.push_back(AttentionCase(whole, 1, 1, 131072));
  cases.push_back(AttentionCase(whole, "decode_attention", "32 x 1 of 128 to 32768", MixedDecodes(32)));
  for (const Rank& rank : eighths) {
    for (int64_t sequences : {1, 32}) cases.push_back(AttentionCase(rank, sequences, 1, 8192));
  }
  for (int64_t queries : {512, 2048, 4096, 8192, 16384, 32768}) {
    cases.push_back(AttentionCase(whole, 1, queries, queries));
  }
  cases.push_back(AttentionCase(whole, 1, 2048, 32768));
  for (const Rank& rank : eighths) cases.push_back(AttentionCase(rank, 1, 512, 32768));
  std::vector<Lengths> mixed = MixedDecodes(32);
  mixed.push_back({512, 8192});
  cases.push_back(AttentionCase(whole, "prefill_attention", "512 of 8192 beside 32 x 1 of 128 to 32768", mixed));
  for (int64_t tokens : {1, 16, 256, 2048, 8192}) AddRowOps(whole, tokens, &cases);
  for (const Sampling& sampling :
       {Sampling{"greedy", {.temperature = 0}},
        {"greedy, 20 log-probabilities", {.temperature = 0, .top_logprobs = 20}},
        {"temperature 0.8, top_p 0.95", {.temperature = 0.8f, .top_p = 0.95f}},
        {"temperature 0.8, top_p 0.95, top_k 50", {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f}},
        {"penalties", {.temperature = 0.8f, .presence_penalty = 0.5f, .repetition_penalty = 1.1f}, true}}) {
    for (int64_t rows : {1, 32, 256}) cases.push_back(SampleCase(rows, sampling));
  }
  for (int64_t rows : {1, 32, 256}) cases.push_back(ScoreCase(rows));
  for (int64_t tokens : {1, 16}) cases.push_back(PlainLinearCase(tokens, whole.hidden, whole.hidden));
  cases.push_back(
      AttentionCase(whole, "plain", "f32, 32 x 1 of 4096", std::vector<Lengths>(32, {1, 4096}), DType::kF32));
  cases.push_back(AttentionCase(whole, "plain", "f32, 1 x 128 of 4096", {{128, 4096}}, DType::kF32));
  return cases;
}

}  // namespace altiplano::gpu

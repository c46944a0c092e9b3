// The CPU ops against the machine's limits. What an op must at least do (bytes moved, products) over the limits gives
// the least time it could take; the share of it is printed, beside the rates.
//
// Operands come from memory as they do in a model: a weight or a page is not used again before far more than the caches
// hold has gone by.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/linear.h"
#include "kernels/cpu/thread_team.h"
#include "kernels/ops.h"
#include "server/base/strings.h"
#include "tests/bench/limits.h"

namespace altiplano::bench {
namespace {

// What one call moves and computes, and which limits hold for it.
struct Work {
  double bytes = 0;
  double flops = 0;
  bool copies = false;  // bytes are written too: held against copy bandwidth
};

class KernelsBench {
 public:
  explicit KernelsBench(Report& report) : report_(report), stream_(Stream::Cpu()), limits_(*stream_) {
    arena_ = Buffer::Allocate(Device::kCpu, size_t{1} << 30);
    if (!arena_) {
      std::fprintf(stderr, "no memory: the kernels need 1 GiB beside the limits' buffer\n");
      std::exit(69);
    }
    FillRandom();
  }

  void Run() {
    report_.Section("kernels on " + Describe(*stream_) + ", Linear by " + cpu::LinearBackend() +
                    ": share of the least time that the limits allow");
    LinearShapes();
    Attention();
    RowOps();
    Sampling();
  }

 private:
  // Small finite numbers, as bf16 and (two bf16 in one) as f32.
  void FillRandom() {
    auto* words = static_cast<uint32_t*>(arena_.data());
    const size_t count = arena_.bytes() / 4;
    stream_->team().Run([&](int worker, int workers) {
      std::minstd_rand random(static_cast<unsigned>(worker) + 1);
      const size_t end = count * static_cast<size_t>(worker + 1) / static_cast<size_t>(workers);
      for (size_t i = count * static_cast<size_t>(worker) / static_cast<size_t>(workers); i < end; ++i) {
        const auto bits = static_cast<uint32_t>(random());
        words[i] = 0x3c003c00 | (bits & 0x01ff01ff) | ((bits & 0x01000100) << 7);  // sign, size around 2^-7
      }
    });
  }

  // The next `bytes` of the arena, in turn: cold when the arena's other parts have been used meanwhile.
  char* Next(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (next_ + bytes > arena_.bytes()) next_ = 0;
    char* at = static_cast<char*>(arena_.data()) + next_;
    next_ += bytes;
    return at;
  }

  void Measure(const std::string& name, const Work& work, const std::function<void()>& subject, int rounds = 15) {
    const std::vector<Timing> timings = Interleave(
        {[&] { limits_.Read(); }, [&] { limits_.Copy(); }, [&] { limits_.MultiplyBf16(); }, subject}, rounds, 0.0005);
    // The least time: the larger of moving and computing, since they can overlap.
    auto least = [&](size_t round, bool best) {
      auto seconds = [&](const Timing& t) { return best ? t.best() : t.seconds[round]; };
      const double move = work.copies ? seconds(timings[1]) * work.bytes / (2 * Limits::kCopyBytes)
                                      : seconds(timings[0]) * work.bytes / Limits::kReadBytes;
      return std::max(move, seconds(timings[2]) * work.flops / limits_.multiply_flops(true));
    };
    Timing floor;
    for (size_t round = 0; round < timings[3].seconds.size(); ++round) floor.seconds.push_back(least(round, false));
    const double took = timings[3].best();
    const bool memory_bound = least(0, true) > timings[2].best() * work.flops / limits_.multiply_flops(true);
    Result result;
    result.name = name;
    result.value = (memory_bound ? work.bytes : work.flops) / took / 1e9;
    result.unit = memory_bound ? "GB/s" : "GFLOP/s";
    result.limit = (memory_bound ? work.bytes : work.flops) / least(0, true) / 1e9;
    result.limit_name = memory_bound ? work.copies ? "copy bandwidth" : "read bandwidth" : "GEMM peak";
    result.ratio = least(0, true) / took;
    result.median_ratio = MedianRatio(floor, timings[3]);
    result.trusted = std::all_of(timings.begin(), timings.end(), [](const Timing& t) { return t.trusted(); });
    result.extra = {{"seconds", took}, {"bytes", work.bytes}, {"flops", work.flops}};
    report_.Add(result);
  }

  void LinearShapes() {
    struct Shape {
      const char* name;
      int64_t n, k;
    };
    struct Model {
      const char* name;
      std::vector<Shape> shapes;
    };
    const std::vector<Model> models = {
        {"SmolLM2-135M",
         {{"qkv", 960, 576}, {"o", 576, 576}, {"gate_up", 3072, 576}, {"down", 576, 1536}, {"lm_head", 49152, 576}}},
        {"Llama 8B", {{"qkv", 6144, 4096}, {"o", 4096, 4096}, {"gate_up", 28672, 4096}, {"down", 4096, 14336}}}};
    Buffer x = Buffer::Allocate(Device::kCpu, 512 * 14336 * 2), out = Buffer::Allocate(Device::kCpu, 512 * 49152 * 4);
    std::memcpy(x.data(), arena_.data(), x.bytes());
    for (const Model& model : models) {
      for (int64_t tokens : {1, 8, 32, 512}) {
        for (const Shape& shape : model.shapes) {
          if (tokens == 512 && shape.n == 49152) continue;  // a step wants the logits of few rows
          const auto weight_bytes = static_cast<size_t>(shape.n * shape.k * 2);
          const Work work{.bytes = static_cast<double>(weight_bytes),
                          .flops = 2.0 * static_cast<double>(tokens * shape.n * shape.k)};
          const bool long_one = work.flops > 20e9;
          Measure(
              StrCat(model.name, " ", shape.name, " [", shape.n, ", ", shape.k, "] T=", tokens), work,
              [&] {
                Linear(*stream_, {.out = TensorView::Make(out.data(), DType::kBF16, {tokens, shape.n}),
                                  .x = TensorView::Make(x.data(), DType::kBF16, {tokens, shape.k}),
                                  .weight = TensorView::Make(Next(weight_bytes), DType::kBF16, {shape.n, shape.k})});
              },
              long_one ? 3 : 15);
        }
      }
    }
  }

  // One sequence for each of `batch`, `queries` new tokens each at the end of a context of `context`.
  void MeasureAttention(const std::string& name, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t batch,
                        int64_t queries, int64_t context) {
    constexpr int64_t kPage = 16;
    const int64_t pages_each = (context + kPage - 1) / kPage, pages = pages_each * batch;
    const auto pool_bytes = static_cast<size_t>(pages * kv_heads * kPage * dim * 2);
    const int64_t tokens = batch * queries;
    std::vector<int32_t> tables(static_cast<size_t>(pages)), q_begin, lengths;
    for (int64_t i = 0; i < pages; ++i) tables[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    std::shuffle(tables.begin(), tables.end(), std::minstd_rand(1));
    for (int64_t b = 0; b <= batch; ++b) q_begin.push_back(static_cast<int32_t>(b * queries));
    lengths.assign(static_cast<size_t>(batch), static_cast<int32_t>(context));
    Buffer q = Buffer::Allocate(Device::kCpu, static_cast<size_t>(tokens * q_heads * dim * 2));
    Buffer out = Buffer::Allocate(Device::kCpu, q.bytes());
    std::memcpy(q.data(), arena_.data(), q.bytes());

    double seen = 0;  // keys that queries look at, all of them together
    for (int64_t i = 0; i < queries; ++i) seen += static_cast<double>(batch * (context - queries + i + 1));
    const Work work{.bytes = static_cast<double>(batch * context * kv_heads * dim * 2 * 2),
                    .flops = 4.0 * seen * static_cast<double>(q_heads * dim)};
    Measure(
        name, work,
        [&] {
          PagedAttention(*stream_,
                         {.out = TensorView::Make(out.data(), DType::kBF16, {tokens, q_heads * dim}),
                          .q = TensorView::Make(q.data(), DType::kBF16, {tokens, q_heads * dim}),
                          .k_pages = TensorView::Make(Next(pool_bytes), DType::kBF16, {pages, kv_heads, kPage, dim}),
                          .v_pages = TensorView::Make(Next(pool_bytes), DType::kBF16, {pages, kv_heads, kPage, dim}),
                          .q_begin = TensorView::Make(q_begin.data(), DType::kI32, {batch + 1}),
                          .context_lengths = TensorView::Make(lengths.data(), DType::kI32, {batch}),
                          .block_tables = TensorView::Make(tables.data(), DType::kI32, {batch, pages_each}),
                          .scale = 1.0f / std::sqrt(static_cast<float>(dim))});
        },
        15);
  }

  void Attention() {
    MeasureAttention("SmolLM2 attention, decode B=1 at 2048", 9, 3, 64, 1, 1, 2048);
    MeasureAttention("SmolLM2 attention, decode B=32 at 1024", 9, 3, 64, 32, 1, 1024);
    MeasureAttention("SmolLM2 attention, prefill 512", 9, 3, 64, 1, 512, 512);
    MeasureAttention("SmolLM2 attention, prefill 2048", 9, 3, 64, 1, 2048, 2048);
    MeasureAttention("Llama 8B attention, decode B=1 at 8192", 32, 8, 128, 1, 1, 8192);
    MeasureAttention("Llama 8B attention, decode B=32 at 1024", 32, 8, 128, 32, 1, 1024);
    MeasureAttention("Llama 8B attention, prefill 512", 32, 8, 128, 1, 512, 512);
    MeasureAttention("Llama 8B attention, chunk 512 at 4096", 32, 8, 128, 1, 512, 4096);
  }

  void RowOps() {
    constexpr int64_t kTokens = 256, kHidden = 4096, kFfn = 14336;
    constexpr auto kCells = static_cast<size_t>(kTokens * kHidden);
    auto f32 = [&](int64_t rows, int64_t columns) {
      return TensorView::Make(Next(static_cast<size_t>(rows * columns) * 4), DType::kF32, {rows, columns});
    };
    auto bf16 = [&](int64_t rows, int64_t columns) {
      return TensorView::Make(Next(static_cast<size_t>(rows * columns) * 2), DType::kBF16, {rows, columns});
    };
    std::vector<float> norm(kHidden, 1.0f);
    const TensorView weight = TensorView::Make(norm.data(), DType::kF32, {kHidden});
    auto bytes = [](double per_cell) { return Work{.bytes = per_cell * static_cast<double>(kCells), .copies = true}; };

    Measure("RmsNorm f32 -> bf16, T=256 H=4096", bytes(4 + 2), [&] {
      RmsNorm(*stream_, {.out = bf16(kTokens, kHidden), .x = f32(kTokens, kHidden), .weight = weight, .eps = 1e-5f});
    });
    Measure("AddRmsNorm f32 -> bf16, T=256 H=4096", bytes(4 + 4 + 4 + 2), [&] {
      AddRmsNorm(*stream_, {.out = bf16(kTokens, kHidden),
                            .residual = f32(kTokens, kHidden),
                            .x = f32(kTokens, kHidden),
                            .weight = weight,
                            .eps = 1e-5f});
    });
    FillRandom();  // residuals have grown
    Measure("SiluMul bf16, T=256 F=14336", {.bytes = 3.0 * 2 * static_cast<double>(kTokens * kFfn), .copies = true},
            [&] { SiluMul(*stream_, {.out = bf16(kTokens, kFfn), .gate_up = bf16(kTokens, 2 * kFfn)}); });
    std::vector<int32_t> ids, slots;
    for (int32_t i = 0; i < kTokens; ++i) ids.push_back(i * 7 % 1024), slots.push_back(i);
    const TensorView positions = TensorView::Make(ids.data(), DType::kI32, {kTokens});
    Measure("Embed bf16 -> f32, T=256 H=4096", bytes(2 + 4),
            [&] { Embed(*stream_, {.out = f32(kTokens, kHidden), .table = bf16(1024, kHidden), .ids = positions}); });
    Measure("GatherRows f32, T=256 H=4096", bytes(4 + 4),
            [&] { GatherRows(*stream_, {.out = f32(kTokens, kHidden), .x = f32(1024, kHidden), .rows = positions}); });
    constexpr int64_t kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 16;
    std::vector<float> frequencies(kDim / 2, 0.01f);
    // Reads and writes q, reads k and v, writes k and v pages: four bytes a cell of each.
    Measure("RopeStoreKv bf16, T=256, 32 + 2 x 8 heads",
            {.bytes = 4.0 * static_cast<double>(kTokens * (kHeads + 2 * kKvHeads) * kDim), .copies = true}, [&] {
              const TensorView qkv = bf16(kTokens, (kHeads + 2 * kKvHeads) * kDim);
              auto pages = [&] {
                const auto pool = static_cast<size_t>(kTokens * kKvHeads * kDim * 2);
                return TensorView::Make(Next(pool), DType::kBF16, {kTokens / kPage, kKvHeads, kPage, kDim});
              };
              RopeStoreKv(*stream_, {.q = qkv.columns(0, kHeads * kDim),
                                     .k = qkv.columns(kHeads * kDim, kKvHeads * kDim),
                                     .v = qkv.columns((kHeads + kKvHeads) * kDim, kKvHeads * kDim),
                                     .k_pages = pages(),
                                     .v_pages = pages(),
                                     .positions = positions,
                                     .slots = TensorView::Make(slots.data(), DType::kI32, {kTokens}),
                                     .inv_freq = TensorView::Make(frequencies.data(), DType::kF32, {kDim / 2})});
            });
  }

  void Sampling() {
    constexpr int64_t kVocab = 128256, kRows = 64;
    struct Case {
      const char* name;
      SampleParams params;
    };
    SampleParams greedy, plain, filtered, penalised;
    greedy.temperature = 0;
    filtered.top_k = 50, filtered.top_p = 0.9f, filtered.temperature = 0.8f;
    SampleParams top_p;
    top_p.top_p = 0.95f;
    std::vector<uint16_t> counts(kVocab);
    std::vector<uint8_t> in_prompt(kVocab);
    for (size_t i = 0; i < counts.size(); i += 300) counts[i] = 1, in_prompt[i + 1] = 1;
    penalised = filtered;
    penalised.repetition_penalty = 1.1f, penalised.presence_penalty = 0.5f;
    penalised.output_counts = counts.data(), penalised.in_prompt = in_prompt.data();
    SampleParams logprobs = greedy;
    logprobs.top_logprobs = 20;

    // Logits as models give them: most around zero, few far above.
    std::minstd_rand random(7);
    std::normal_distribution<float> normal(0, 2);
    auto* cells = static_cast<float*>(arena_.data());
    for (int64_t i = 0; i < kVocab; ++i) cells[i] = normal(random);
    for (int i = 0; i < 40; ++i) cells[random() % kVocab] = 10 + normal(random);
    const size_t matrix = static_cast<size_t>(kRows * kVocab) * 4;
    for (size_t at = kVocab * 4; at + kVocab * 4 <= arena_.bytes(); at += kVocab * 4) {
      std::memcpy(static_cast<char*>(arena_.data()) + at, arena_.data(), kVocab * 4);
    }
    Buffer scratch = Buffer::Allocate(Device::kCpu, std::max<size_t>(1, SampleScratchBytes(kRows, kVocab)));
    std::vector<SampleResult> results(kRows);
    for (const Case& one : {Case{"greedy", greedy},
                            {"temperature 1", plain},
                            {"top-p 0.95", top_p},
                            {"top-k 50, top-p 0.9, t 0.8", filtered},
                            {"the same with penalties", penalised},
                            {"greedy, 20 logprobs", logprobs}}) {
      std::vector<SampleParams> params(kRows, one.params);
      for (size_t i = 0; i < params.size(); ++i) params[i].seed = i;
      const std::vector<Timing> timings =
          Interleave({[&] { limits_.Read(); },
                      [&] {
                        Sample(*stream_, {.results = results.data(),
                                          .params = params.data(),
                                          .logits = TensorView::Make(Next(matrix), DType::kF32, {kRows, kVocab}),
                                          .scratch = scratch.data()});
                      }},
                     15, 0.0005);
      // A row's least time: reading it once.
      const double read = timings[0].best() * kVocab * 4 / Limits::kReadBytes, took = timings[1].best() / kRows;
      Timing floor;
      for (double seconds : timings[0].seconds)
        floor.seconds.push_back(seconds * kVocab * 4 * kRows / Limits::kReadBytes);
      Result result;
      result.name = StrCat("Sample V=128256, ", one.name);
      result.value = took * 1e6;
      result.unit = "us/row";
      result.limit = read * 1e6;
      result.limit_name = "reading the row once";
      result.ratio = read / took;
      result.median_ratio = MedianRatio(floor, timings[1]);
      result.trusted = timings[0].trusted() && timings[1].trusted();
      report_.Add(result);
    }
  }

  Report& report_;
  std::unique_ptr<Stream> stream_;
  Limits limits_;
  Buffer arena_;
  size_t next_ = 0;
};

}  // namespace
}  // namespace altiplano::bench

int main(int argc, char** argv) {
  altiplano::bench::Report report("kernels", argc, argv);
  altiplano::bench::KernelsBench(report).Run();
}

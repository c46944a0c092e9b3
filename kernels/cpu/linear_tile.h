// The blocked matrix product that the vector instruction sets share; each *_avx*.cc instantiates it with its vectors.
//
// Lanes run along K, for x and weights alike, so weights stay as they lie in the checkpoint. A tile is kGroup tokens by
// kPanel weight rows, one accumulator register each:
//
//            k ->  step 0      step 1
//   x      [ lanes 0..L-1 ][ lanes 0..L-1 ] ...     acc[token][row] += x * weight, lane by lane
//   weight [ lanes 0..L-1 ][ lanes 0..L-1 ] ...
//
// An output's order of additions depends on K alone: within a block of K each lane adds up its elements in order, the
// lanes are folded by one fixed tree, the blocks are added in order. So a token's row is the same, bit for bit,
// whatever else is in the batch and however the work is shared out.
//
// Loops, outside in: kLinearColumns weight rows | blocks of K | panels of weight rows (in L1) | groups of tokens
// (packed x, in L2). With many tokens a panel is first packed as x is: widened once for all of them, in one piece, and
// with nothing but multiplications in the inner loop. With few tokens, a panel's rows are walked to their ends instead,
// so that memory is read in long runs; with one or two, in several runs side by side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/linear_kernel.h"

namespace altiplano::cpu {

// V, in an anonymous namespace of its file, says what a vector is:
//   Weight   as stored; Element of packed x; Acc, an accumulator
//   kStep    elements of K in a step, which takes kHalves pairs of vectors
//   kRuns    panels whose accumulators fit the registers, for one token
//   kMaxBlock  longest block of K: kPanel weight rows and kGroup tokens of it should fit L1
//   LoadWeight(p, half), LoadWeightTail(p, half, count), LoadX(p, half), Zero(), Dot(acc, weight, x)
//   PackStep(from, count, to): a step of one token, zeros beyond count
//   Reduce<count>(acc, flat): folds each accumulator's lanes into flat[i]; may write up to the next multiple of 16
//   LoadSum<n>(p), StoreSum<n>(p, sum), AddSum(a, b): n results, p being float* or (rounding) Weight*
template <class V>
struct LinearTile {
  using Weight = typename V::Weight;
  using Element = typename V::Element;
  static constexpr int64_t kFewTokens = 32;
  // How far ahead of a run memory is asked for: the hardware's prefetchers stop at each page of 4 KiB.
  static constexpr int64_t kRunAhead = 1024 / static_cast<int64_t>(sizeof(Weight));
  static constexpr int64_t kPackedGroups = 6;  // with as many groups of tokens a panel is worth packing
  static_assert(V::kPanel == 6 && V::kGroup <= 4 && kPackedGroups == V::kPanel && V::kMaxBlock % V::kStep == 0);

  static int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

  // Blocks of nearly equal length: a short last one would fold lanes for little.
  static int64_t BlockOf(int64_t k) {
    const int64_t blocks = (k + V::kMaxBlock - 1) / V::kMaxBlock;
    return RoundUp((k + blocks - 1) / blocks, V::kStep);
  }

  // Packed x: [block of K][group][step][token of the group][lane].
  static int64_t PackedOffset(int64_t tokens, int64_t k, int64_t k0, int64_t t0) {
    return k0 * tokens + t0 * RoundUp(Min(BlockOf(k), k - k0), V::kStep);
  }

  static void Pack(const void* x, int64_t x_stride, int64_t tokens, int64_t k, int64_t begin, int64_t end,
                   void* packed) {
    const int64_t block = BlockOf(k);
    for (int64_t t0 = begin; t0 < end; t0 += V::kGroup) {
      const int64_t group = Min(V::kGroup, tokens - t0);
      for (int64_t k0 = 0; k0 < k; k0 += block) {
        const int64_t length = Min(block, k - k0);
        Element* to = static_cast<Element*>(packed) + PackedOffset(tokens, k, k0, t0);
        for (int64_t i = 0; i < group; ++i) {
          const Weight* from = static_cast<const Weight*>(x) + (t0 + i) * x_stride + k0;
          for (int64_t j = 0; j < length; j += V::kStep) {
            V::PackStep(from + j, Min(V::kStep, length - j), to + j * group + i * V::kStep);
          }
        }
      }
    }
  }

  // A panel of weight rows to come, towards which each group of tokens prefetches its share of lines, evenly, while it
  // multiplies the present one: memory and arithmetic overlap.
  struct Ahead {
    const char* from;
    int64_t per_element;  // bytes onward for each element of K
    int64_t per_line;
  };

  struct Block {
    const LinearTask* task;
    float* partial;  // of column n0
    Element* panel;  // room for a packed panel
    int64_t n0;
    int64_t k0;
    int64_t k;  // elements of K in this block
    bool first, last;
    bool walk;  // blocks of K are the inner loop, so the panel to come lies in one piece
  };

  // To L2: at the pace of memory lines would be evicted from L1 before their turn.
  template <int kLines>
  static void Prefetch(const Ahead& ahead, int64_t j) {
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) {
      __builtin_prefetch(ahead.from + j * ahead.per_element + i * ahead.per_line, 0, 2);
    }
  }

  // Where a tile's weights come from: rows as they are stored,
  struct Rows {
    static constexpr bool kPadded = false;
    const Weight* at;
    int64_t stride;
    auto Load(int64_t j, int row, int half) const { return V::LoadWeight(at + row * stride + j, half); }
  };
  // or a panel packed as x is, where zeros stand for what K lacks of a step.
  struct PackedRows {
    static constexpr bool kPadded = true;
    const Element* at;
    auto Load(int64_t j, int row, int half) const { return V::LoadX(at + j * V::kPanel + row * V::kStep, half); }
  };

  template <int kTokens, int kRows>
  static void TailStep(typename V::Acc* acc, const Weight* weight, int64_t stride, const Element* x, int count) {
    for (int half = 0; half < V::kHalves; ++half) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto w = V::LoadWeightTail(weight + r * stride, half, count);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) {
          acc[i * kRows + r] = V::Dot(acc[i * kRows + r], w, V::LoadX(x + i * V::kStep, half));
        }
      }
    }
  }

  template <int kTokens, int kRows, int kLines, class Source>
  static void Tile(Source weights, const Element* x, int64_t k, const Ahead& ahead, float* flat) {
    typename V::Acc acc[kTokens * kRows];
#pragma GCC unroll 32
    for (int i = 0; i < kTokens * kRows; ++i) acc[i] = V::Zero();
    const int64_t whole = Source::kPadded ? k : k / V::kStep * V::kStep;
    for (int64_t j = 0; j < whole; j += V::kStep) {
      Prefetch<kLines>(ahead, j);
#pragma GCC unroll 2
      for (int half = 0; half < V::kHalves; ++half) {
        typename V::X lanes[kTokens];
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) lanes[i] = V::LoadX(x + j * kTokens + i * V::kStep, half);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto w = weights.Load(j, r, half);
#pragma GCC unroll 8
          for (int i = 0; i < kTokens; ++i) acc[i * kRows + r] = V::Dot(acc[i * kRows + r], w, lanes[i]);
        }
      }
    }
    if constexpr (!Source::kPadded) {
      if (whole < k) {
        TailStep<kTokens, kRows>(acc, weights.at + whole, weights.stride, x + whole * kTokens,
                                 static_cast<int>(k - whole));
      }
    }
    V::template Reduce<kTokens * kRows>(acc, flat);
  }

  template <int kLines>
  static Ahead AheadOf(const Block& block, int64_t n, int64_t group) {
    constexpr int64_t kSize = sizeof(Weight);
    const int64_t stride = block.task->weight_stride * kSize;
    const char* panel = static_cast<const char*>(block.task->weight) + (n + V::kPanel) * stride;
    if (block.walk) {
      const char* from = panel + (block.k0 * V::kPanel + group * kLines * block.k) * kSize;
      return {from, kLines * kSize, V::kStep * kSize};
    }
    return {panel + group * kLines * stride + block.k0 * kSize, kSize, stride};
  }

  template <int kRows, typename T>
  static void Store(T* out, bool accumulate, typename V::Sum sum) {
    if (accumulate) sum = V::AddSum(V::template LoadSum<kRows>(out), sum);
    V::template StoreSum<kRows>(out, sum);
  }

  // flat: [kTokens, kRows] sums over this block of K, for columns n on.
  template <int kTokens, int kRows>
  static void StoreTile(const Block& block, int64_t t0, int64_t n, const float* flat) {
    const LinearTask& task = *block.task;
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      auto sum = V::template LoadSum<kRows>(flat + i * kRows);
      float* partial = block.partial + (t0 + i) * kLinearColumns + (n - block.n0);
      if (!block.first) sum = V::AddSum(V::template LoadSum<kRows>(partial), sum);
      const int64_t offset = (t0 + i) * task.out_stride + n;
      if (!block.last) {
        V::template StoreSum<kRows>(partial, sum);
      } else if (task.out_f32) {
        Store<kRows>(static_cast<float*>(task.out) + offset, task.accumulate, sum);
      } else {
        Store<kRows>(static_cast<Weight*>(task.out) + offset, task.accumulate, sum);
      }
    }
  }

  template <int kTokens, int kRows, int kLines, class Source>
  static void TileAndStore(Source weights, const Block& block, int64_t t0, int64_t n) {
    const LinearTask& task = *block.task;
    alignas(64) float flat[(kTokens * kRows + 15) / 16 * 16 + 16];
    Tile<kTokens, kRows, kLines>(
        weights, static_cast<const Element*>(task.packed) + PackedOffset(task.tokens, task.k, block.k0, t0), block.k,
        AheadOf<kLines>(block, n, t0 / V::kGroup), flat);
    StoreTile<kTokens, kRows>(block, t0, n, flat);
  }

  // Few tokens and all of K in one block: nothing but reading weights. Panels that lie `apart` rows from each other are
  // read side by side, row by row: several runs through memory, which the hardware's prefetchers follow all at once.
  template <int kTokens, int kRuns>
  static void Runs(const Block& block, int64_t n, int64_t apart) {
    const LinearTask& task = *block.task;
    typename V::Acc acc[kRuns][kTokens * V::kPanel];
    const Weight* const weight = static_cast<const Weight*>(task.weight) + n * task.weight_stride;
    const int64_t whole = task.k / V::kStep * V::kStep, jump = apart * task.weight_stride;
    const Element* const x = static_cast<const Element*>(task.packed);
#pragma GCC unroll 8
    for (int run = 0; run < kRuns; ++run) {
#pragma GCC unroll 16
      for (int i = 0; i < kTokens * V::kPanel; ++i) acc[run][i] = V::Zero();
    }
#pragma GCC unroll 8
    for (int r = 0; r < V::kPanel; ++r) {
      const Weight* row = weight + r * task.weight_stride;
      for (int64_t j = 0; j < whole; j += V::kStep) {
#pragma GCC unroll 2
        for (int half = 0; half < V::kHalves; ++half) {
#pragma GCC unroll 8
          for (int run = 0; run < kRuns; ++run) {
            if (half == 0) __builtin_prefetch(row + run * jump + j + kRunAhead, 0, 3);
            const auto w = V::LoadWeight(row + run * jump + j, half);
#pragma GCC unroll 2
            for (int i = 0; i < kTokens; ++i) {
              auto& sum = acc[run][i * V::kPanel + r];
              sum = V::Dot(sum, w, V::LoadX(x + j * kTokens + i * V::kStep, half));
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int run = 0; run < kRuns; ++run) {
      if (whole < task.k) {
        TailStep<kTokens, V::kPanel>(acc[run], weight + run * jump + whole, task.weight_stride, x + whole * kTokens,
                                     static_cast<int>(task.k - whole));
      }
      alignas(64) float flat[(kTokens * V::kPanel + 15) / 16 * 16 + 16];
      V::template Reduce<kTokens * V::kPanel>(acc[run], flat);
      StoreTile<kTokens, V::kPanel>(block, 0, n + run * apart, flat);
    }
  }

  // Returns the first row that is left.
  template <int kTokens>
  static int64_t ReadSideBySide(const Block& block, int64_t begin, int64_t end) {
    constexpr int kRuns = V::kRuns / kTokens;
    const int64_t panels = (end - begin) / V::kPanel / kRuns;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Runs<kTokens, kRuns>(block, begin + panel * V::kPanel, panels * V::kPanel);
    }
    return begin + panels * kRuns * V::kPanel;
  }

  // Up to `count` whole groups from token t on; returns the token after them.
  template <int kRows, int kLines, class Source>
  static int64_t Groups(Source weights, const Block& block, int64_t n, int64_t t, int64_t count) {
    for (; count > 0 && t + V::kGroup <= block.task->tokens; t += V::kGroup, --count) {
      TileAndStore<V::kGroup, kRows, kLines>(weights, block, t, n);
    }
    return t;
  }

  // The last group, of fewer tokens.
  template <int kTokens, int kRows, class Source>
  static void Last(Source weights, const Block& block, int64_t n) {
    const int64_t t = block.task->tokens - kTokens;
    if (t > 0 || kRows < V::kPanel) return TileAndStore<kTokens, kRows, 0>(weights, block, t, n);
    TileAndStore<kTokens, kRows, kRows>(weights, block, t, n);
  }

  // The tokens from t on.
  template <int kRows, class Source>
  static void Rest(Source weights, const Block& block, int64_t n, int64_t t) {
    const int64_t tokens = block.task->tokens;
    t = Groups<kRows, 0>(weights, block, n, t, tokens / V::kGroup);
    switch (tokens - t) {
      case 3:
        if constexpr (V::kGroup > 3) Last<3, kRows>(weights, block, n);
        break;
      case 2:
        if constexpr (V::kGroup > 2) Last<2, kRows>(weights, block, n);
        break;
      case 1:
        Last<1, kRows>(weights, block, n);
        break;
      default:
        break;
    }
  }

  // A panel times many tokens.
  static void PackedPanel(const Block& block, int64_t n) {
    const LinearTask& task = *block.task;
    const Weight* const rows = static_cast<const Weight*>(task.weight) + n * task.weight_stride + block.k0;
    for (int64_t j = 0; j < block.k; j += V::kStep) {
      for (int r = 0; r < V::kPanel; ++r) {
        V::PackStep(rows + r * task.weight_stride + j, Min(V::kStep, block.k - j),
                    block.panel + j * V::kPanel + r * V::kStep);
      }
    }
    const PackedRows weights{block.panel};
    Rest<V::kPanel>(weights, block, n, Groups<V::kPanel, 1>(weights, block, n, 0, kPackedGroups));
  }

  // One panel's rows (or a row left over) times all tokens.
  template <int kRows>
  static void Panel(const Block& block, int64_t n) {
    const LinearTask& task = *block.task;
    const int64_t groups = task.tokens / V::kGroup;
    const Rows weights{static_cast<const Weight*>(task.weight) + n * task.weight_stride + block.k0, task.weight_stride};
    int64_t t = 0;
    if constexpr (kRows == V::kPanel) {  // six lines a step, shared by the groups
      if (groups >= kPackedGroups) return PackedPanel(block, n);
      if (groups == 1) {
        t = Groups<kRows, 6>(weights, block, n, t, 1);
      } else if (groups == 2) {
        t = Groups<kRows, 3>(weights, block, n, t, 2);
      } else {
        t = Groups<kRows, 2>(weights, block, n, t, 3);
      }
    }
    Rest<kRows>(weights, block, n, t);
  }

  static void Run(const LinearTask& task, int64_t begin, int64_t end, float* partial) {
    alignas(64) Element panel[V::kPanel * V::kMaxBlock];
    const int64_t length = BlockOf(task.k);
    const bool walk = task.tokens <= kFewTokens && task.weight_stride == task.k && length < task.k;
    const int64_t columns = walk ? V::kPanel : kLinearColumns;
    if (task.tokens <= 2 && length >= task.k && begin < end) {
      const Block block{.task = &task,
                        .partial = partial,
                        .panel = panel,
                        .n0 = begin,
                        .k0 = 0,
                        .k = task.k,
                        .first = true,
                        .last = true,
                        .walk = false};
      begin = task.tokens == 1 ? ReadSideBySide<1>(block, begin, end) : ReadSideBySide<2>(block, begin, end);
    }
    for (int64_t n0 = begin; n0 < end; n0 += columns) {
      const int64_t n1 = Min(end, n0 + columns);
      for (int64_t k0 = 0; k0 < task.k; k0 += length) {
        const Block block{.task = &task,
                          .partial = partial,
                          .panel = panel,
                          .n0 = n0,
                          .k0 = k0,
                          .k = Min(length, task.k - k0),
                          .first = k0 == 0,
                          .last = k0 + length >= task.k,
                          .walk = walk};
        int64_t n = n0;
        for (; n + V::kPanel <= n1; n += V::kPanel) Panel<V::kPanel>(block, n);
        for (; n < n1; ++n) Panel<1>(block, n);
      }
    }
  }

  static constexpr LinearKernel Kernel(const char* name) {
    return {.name = name,
            .panel = V::kPanel,
            .group = V::kGroup,
            .step = V::kStep,
            .packed_element = sizeof(Element),
            .pack = &Pack,
            .run = &Run};
  }
};

}  // namespace altiplano::cpu

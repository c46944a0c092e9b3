// What the tests of PagedAttention share, on the CPU and in CUDA: sequences, and steps over parts of them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/paged_attention_plan.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {

struct AttentionShape {
  int64_t kv_heads = 1, group = 1, dim = 64;
  DType act = DType::kF32;
  DType q = DType::kF32;

  int64_t q_width() const { return kv_heads * group * dim; }
  int64_t kv_width() const { return kv_heads * dim; }
  float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(dim))); }
};

// Pages and queries of one dtype, and f32 queries on bf16 pages.
inline std::vector<AttentionShape> WithDTypes(AttentionShape s) {
  std::vector<AttentionShape> all;
  for (const auto& [act, q] :
       {std::pair{DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}}) {
    s.act = act;
    s.q = q;
    all.push_back(s);
  }
  return all;
}

// All that attention may know of a sequence: what each token asks, and what it leaves in the cache.
struct Sequence {
  Sequence(const AttentionShape& s, int64_t length, uint32_t seed)
      : q(length, s.q_width(), s.q), k(length, s.kv_width(), s.act), v(length, s.kv_width(), s.act) {
    q.FillNormal(seed);
    k.FillNormal(seed + 1000);
    v.FillNormal(seed + 2000);
  }
  Matrix q, k, v;
};
using Sequences = std::vector<std::unique_ptr<Sequence>>;

inline Sequences MakeSequences(const AttentionShape& s, const std::vector<int64_t>& lengths) {
  Sequences sequences;
  for (size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back(std::make_unique<Sequence>(s, lengths[i], static_cast<uint32_t>(i + 1)));
  }
  return sequences;
}

// Queries [begin, end) of a sequence, whose first `end` tokens are in the cache.
struct Part {
  size_t sequence;
  int64_t begin, end;
};

// The operands of a step over `parts`. Every part has pages of its own, scattered over the pool; what its queries do
// not see, in its last page or in pages of nobody, is NaN, and what its table does not need points nowhere. Rows of q
// in order; `gap` elements between the rows of q, out and the tables.
class AttentionStep {
 public:
  AttentionStep(const AttentionShape& s, const Sequences& sequences, const std::vector<Part>& parts, int64_t page_size,
                int64_t gap)
      : counts_(Count(parts, page_size)),
        k_pages(pages() * s.kv_heads * page_size, s.dim, s.act),
        v_pages(pages() * s.kv_heads * page_size, s.dim, s.act),
        tables(static_cast<int64_t>(parts.size()), most_pages(), DType::kI32, gap),
        q(tokens(), s.q_width(), s.q, gap),
        out(std::make_unique<Matrix>(tokens(), s.q_width(), s.act, gap)) {
    std::vector<int32_t> order(static_cast<size_t>(pages()));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    const size_t element = SizeOf(s.act), head_bytes = static_cast<size_t>(s.dim) * element;
    int64_t token = 0;
    for (int64_t b = 0; b < tables.rows(); ++b) {
      const Part& part = parts[static_cast<size_t>(b)];
      const Sequence& sequence = *sequences[part.sequence];
      for (int64_t i = 0; i < most_pages(); ++i) tables.set(b, i, std::numeric_limits<int32_t>::max());
      for (int64_t position = 0; position < part.end; ++position) {
        if (position % page_size == 0) {
          tables.set(b, position / page_size, order.back());
          order.pop_back();
        }
        const auto page = static_cast<int64_t>(tables.at(b, position / page_size));
        for (int64_t h = 0; h < s.kv_heads; ++h) {
          const int64_t row = (page * s.kv_heads + h) * page_size + position % page_size;
          const size_t at = static_cast<size_t>(h * s.dim) * element;
          std::memcpy(k_pages.view().row<char>(row * static_cast<int64_t>(element)),
                      sequence.k.RowBytes(position).data() + at, head_bytes);
          std::memcpy(v_pages.view().row<char>(row * static_cast<int64_t>(element)),
                      sequence.v.RowBytes(position).data() + at, head_bytes);
        }
      }
      for (int64_t i = part.begin; i < part.end; ++i, ++token) {
        for (int64_t j = 0; j < s.q_width(); ++j) q.set(token, j, sequence.q.at(i, j));
      }
      q_begin.push_back(static_cast<int32_t>(token));
      lengths.push_back(static_cast<int32_t>(part.end));
    }
  }

  int64_t tokens() const { return counts_.tokens; }
  int64_t pages() const { return counts_.used_pages + 3; }
  int64_t most_pages() const { return counts_.most_pages; }

 private:
  struct Counts {
    int64_t tokens = 0, most_pages = 1, used_pages = 0;
  };
  static Counts Count(const std::vector<Part>& parts, int64_t page_size) {
    Counts counts;
    for (const Part& part : parts) {
      const int64_t pages = (part.end + page_size - 1) / page_size;
      counts.tokens += part.end - part.begin;
      counts.most_pages = std::max(counts.most_pages, pages);
      counts.used_pages += pages;
    }
    return counts;
  }
  const Counts counts_;

 public:
  Matrix k_pages, v_pages, tables, q;
  std::unique_ptr<Matrix> out;
  std::vector<int32_t> q_begin = {0}, lengths;
};

// The work list of a step on a GPU, and the view of it on the host. It must keep to the room that it is given.
struct AttentionList {
  AttentionList(const cuda::AttentionSizes& sizes, const std::vector<int32_t>& q_begin,
                const std::vector<int32_t>& lengths) {
    const auto sequences = static_cast<int64_t>(lengths.size());
    const auto words = static_cast<size_t>(cuda::AttentionListWords(sizes, q_begin.back(), sequences));
    std::vector<int32_t> room(words + 64, kUnwritten);
    work = cuda::PlanAttention(sizes, q_begin.data(), lengths.data(), sequences, q_begin.back(), room.data());
    EXPECT_EQ(room[words], kUnwritten);
    list.assign(room.begin(), room.begin() + work.list.elements());
    work.list.data = list.data();
  }
  static constexpr int32_t kUnwritten = 0x5A5A5A5A;
  std::vector<int32_t> list;
  AttentionWork work;
};

}  // namespace altiplano

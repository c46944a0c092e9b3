// PagedAttention: who does what. The work is cut into units: the queries of a sequence that share a KV head, a tile of
// queries at a time. A unit walks over its keys from position 0 in segments of kSegment and tiles of kKeyTile:
//
//   keys     |-------- segment 0 --------|-------- segment 1 --------|---- 2 --|
//   tiles    | 64 | 64 | 64 | ...        | ...                       | ... |per|   the last one as far as it is filled
//
// Each segment is summed up from nothing and then folded into the total, in order. So a row's result is a function of
// its query and its keys alone, to the bit: neither the other queries of the step, nor how a prompt was chunked, nor
// the number of threads, nor the page size shows. When there are fewer units than would occupy the team (a long context
// alone), segments are given out separately and folded afterwards: the same sums in the same order.
#include <algorithm>
#include <atomic>
#include <limits>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/paged_attention_kernel.h"
#include "kernels/cpu/vec_threads.h"

namespace altiplano::cpu {

namespace {

constexpr int64_t kSegment = 256;
constexpr int64_t kTileRows = 96;                       // of q, for which a packed tile of keys is good
constexpr size_t kMostPartialBytes = size_t{64} << 20;  // segments apart only while their results fit
constexpr int64_t kWorthThreads = 1 << 16;              // multiplications

struct Shape {
  int64_t dim, padded, kv_heads, group, page_size;
  int64_t tile_queries;  // queries of a unit, at most
  int64_t tile_rows;     // tile_queries * group
};

// Memory of the unit in work. Laid out by Workspace::At.
struct Workspace {
  void* k;
  void* v;
  char* q;
  AttentionState part;
  AttentionState total;
};

size_t Align(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

size_t StateBytes(const Shape& s) {
  return Align(static_cast<size_t>(s.tile_rows) * sizeof(float)) * 2 +
         Align(static_cast<size_t>(s.tile_rows * s.padded) * sizeof(float));
}

AttentionState StateAt(const Shape& s, char* memory) {
  const size_t row = Align(static_cast<size_t>(s.tile_rows) * sizeof(float));
  return {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory + row),
          reinterpret_cast<float*>(memory + 2 * row)};
}

size_t WorkspaceBytes(const Shape& s, const AttentionKernel& kernel) {
  return 2 * Align(static_cast<size_t>(kKeyTile * s.padded) * kernel.packed_element) +
         Align(static_cast<size_t>(s.tile_rows * s.padded) * kernel.packed_element) + 2 * StateBytes(s);
}

Workspace WorkspaceAt(const Shape& s, const AttentionKernel& kernel, char* memory) {
  const size_t tile = Align(static_cast<size_t>(kKeyTile * s.padded) * kernel.packed_element);
  const size_t q = Align(static_cast<size_t>(s.tile_rows * s.padded) * kernel.packed_element);
  return {memory, memory + tile, memory + 2 * tile, StateAt(s, memory + 2 * tile + q),
          StateAt(s, memory + 2 * tile + q + StateBytes(s))};
}

// Some queries of a sequence, for one KV head.
struct Unit {
  int64_t sequence;
  int64_t kv_head;
  int64_t first_query;  // row of q
  int64_t rows;         // queries * group; row r is query first_query + r / group, head kv_head * group + r % group
  int64_t first_limit;  // keys that the first query sees; each later one sees one more

  int64_t limit(int64_t row, int64_t group) const { return first_limit + row / group; }
};

class Attention {
 public:
  Attention(const PagedAttentionArgs& args, const AttentionKernel& kernel);

  void Run(ThreadTeam& team);

 private:
  int64_t Queries(int64_t b) const { return q_begin_[b + 1] - q_begin_[b]; }
  int64_t Tiles(int64_t b) const { return (Queries(b) + shape_.tile_queries - 1) / shape_.tile_queries; }
  Unit UnitAt(int64_t index) const;
  int64_t Limit(const Unit& unit) const { return unit.limit(unit.rows - 1, shape_.group); }
  int64_t Segments(const Unit& unit) const { return (Limit(unit) + kSegment - 1) / kSegment; }
  int64_t SegmentEnd(const Unit& unit, int64_t segment) const {
    return std::min(Limit(unit), (segment + 1) * kSegment);
  }
  void PackQueries(const Unit& unit, const Workspace& work) const;
  void FindRows(const Unit& unit, int64_t begin, int64_t end, KeyRows* rows) const;
  void AttendSegment(const Unit& unit, int64_t segment, int64_t ahead, const Workspace& work,
                     AttentionState state) const;
  void FoldSegment(const Unit& unit, int64_t segment, AttentionState total, AttentionState part) const;
  void FinishUnit(const Unit& unit, AttentionState total) const;
  void RunUnits(ThreadTeam& team, char* scratch);
  void RunSegments(ThreadTeam& team, char* scratch);

  const PagedAttentionArgs& args_;
  const AttentionKernel& kernel_;
  const int32_t* const q_begin_;
  const int32_t* const lengths_;
  const int64_t sequences_;
  Shape shape_;
  int64_t units_ = 0;
  int64_t most_segments_ = 0;
  int64_t multiplications_ = 0;
  const int64_t* unit_begin_ = nullptr;  // [B]: the first unit of each sequence
};

Attention::Attention(const PagedAttentionArgs& args, const AttentionKernel& kernel)
    : args_(args),
      kernel_(kernel),
      q_begin_(args.q_begin.as<int32_t>()),
      lengths_(args.context_lengths.as<int32_t>()),
      sequences_(args.context_lengths.dim(0)) {
  shape_.dim = args.k_pages.dim(3);
  shape_.padded = (shape_.dim + kernel.dim_unit - 1) / kernel.dim_unit * kernel.dim_unit;
  shape_.kv_heads = args.k_pages.dim(1);
  shape_.group = args.q.dim(1) / (shape_.kv_heads * shape_.dim);
  shape_.page_size = args.k_pages.dim(2);
  int64_t most_queries = 1;
  for (int64_t b = 0; b < sequences_; ++b) most_queries = std::max(most_queries, Queries(b));
  shape_.tile_queries = std::clamp<int64_t>(kTileRows / shape_.group, 1, most_queries);
  shape_.tile_rows = shape_.tile_queries * shape_.group;
  for (int64_t b = 0; b < sequences_; ++b) {
    units_ += Tiles(b) * shape_.kv_heads;
    if (Queries(b) > 0) most_segments_ = std::max<int64_t>(most_segments_, (lengths_[b] + kSegment - 1) / kSegment);
    multiplications_ += Queries(b) * lengths_[b] * args.q.dim(1);
  }
}

Unit Attention::UnitAt(int64_t index) const {
  const int64_t b = std::upper_bound(unit_begin_, unit_begin_ + sequences_, index) - unit_begin_ - 1;
  // The last tiles see most keys: they go first, so that the team ends together.
  const int64_t tile = Tiles(b) - 1 - (index - unit_begin_[b]) / shape_.kv_heads;
  const int64_t begin = tile * shape_.tile_queries, end = std::min(Queries(b), begin + shape_.tile_queries);
  return {.sequence = b,
          .kv_head = (index - unit_begin_[b]) % shape_.kv_heads,
          .first_query = q_begin_[b] + begin,
          .rows = (end - begin) * shape_.group,
          .first_limit = lengths_[b] - Queries(b) + begin + 1};
}

void Attention::PackQueries(const Unit& unit, const Workspace& work) const {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const int64_t head = unit.kv_head * shape_.group + row % shape_.group;
    const RowPtr q = RowOf(args_.q, unit.first_query + row / shape_.group, head * shape_.dim);
    kernel_.pack_q(work.q + static_cast<size_t>(row * shape_.padded) * kernel_.packed_element, q, shape_.dim,
                   shape_.padded);
  }
}

// The tile of keys from `begin` on, as far as `end`; behind that its last key again and again.
void Attention::FindRows(const Unit& unit, int64_t begin, int64_t end, KeyRows* rows) const {
  const int32_t* pages = args_.block_tables.row<int32_t>(unit.sequence);
  const auto row_bytes = shape_.dim * static_cast<int64_t>(SizeOf(args_.k_pages.dtype));
  const char* const k_pages = args_.k_pages.as<char>();
  const char* const v_pages = args_.v_pages.as<char>();
  const int64_t keys = std::min(kKeyTile, end - begin);
  int64_t page = begin / shape_.page_size, offset = begin % shape_.page_size;
  for (int64_t j = 0; j < keys; ++page, offset = 0) {
    int64_t at = ((pages[page] * shape_.kv_heads + unit.kv_head) * shape_.page_size + offset) * row_bytes;
    for (; offset < shape_.page_size && j < keys; ++offset, ++j, at += row_bytes) {
      rows->k[j] = k_pages + at;
      rows->v[j] = v_pages + at;
    }
  }
  std::fill(rows->k + keys, rows->k + kKeyTile, rows->k[keys - 1]);
  std::fill(rows->v + keys, rows->v + kKeyTile, rows->v[keys - 1]);
}

// ahead: where the keys end that this thread will look at next, for fetching them in time.
void Attention::AttendSegment(const Unit& unit, int64_t segment, int64_t ahead, const Workspace& work,
                              AttentionState state) const {
  std::fill_n(state.max, unit.rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, unit.rows, 0.0f);
  std::fill_n(state.acc, unit.rows * shape_.padded, 0.0f);
  const int64_t end = SegmentEnd(unit, segment);
  KeyRows tile[2];  // of a tile, and of the next one
  FindRows(unit, segment * kSegment, end, &tile[0]);
  for (int64_t begin = segment * kSegment, side = 0; begin < end; begin += kKeyTile, side = 1 - side) {
    const int64_t keys = std::min(kKeyTile, end - begin);
    const bool last = begin + kKeyTile >= ahead;
    if (!last) FindRows(unit, begin + kKeyTile, ahead, &tile[1 - side]);
    const KeyRows& next = tile[last ? side : 1 - side];
    const UnpackedTile unpacked = {.rows = &tile[side], .next = &next, .keys = keys, .dim = shape_.dim};
    const bool pack = unit.rows > kAttentionRows;
    if (pack) kernel_.pack_kv(tile[side], next, keys, shape_.dim, shape_.padded, work.k, work.v);
    for (int64_t row = 0; row < unit.rows; row += kAttentionRows) {
      const int64_t rows = std::min<int64_t>(kAttentionRows, unit.rows - row);
      int64_t visible[kAttentionRows];
      for (int64_t r = 0; r < rows; ++r) visible[r] = unit.limit(row + r, shape_.group) - begin;
      if (visible[rows - 1] <= 0) continue;
      const AttentionPanel panel = {.rows = rows,
                                    .visible = visible,
                                    .q = work.q + static_cast<size_t>(row * shape_.padded) * kernel_.packed_element,
                                    .k = pack ? work.k : &unpacked,
                                    .v = pack ? work.v : &unpacked,
                                    .keys = keys,
                                    .padded = shape_.padded,
                                    .scale = args_.scale,
                                    .state = {state.max + row, state.sum + row, state.acc + row * shape_.padded}};
      pack ? kernel_.attend(panel) : kernel_.attend_unpacked(panel);
    }
  }
}

// Rows that see nothing of the segment stay as they are; they come first.
void Attention::FoldSegment(const Unit& unit, int64_t segment, AttentionState total, AttentionState part) const {
  const int64_t blind = std::clamp<int64_t>((segment * kSegment - unit.first_limit + 1) * shape_.group, 0, unit.rows);
  kernel_.fold({total.max + blind, total.sum + blind, total.acc + blind * shape_.padded},
               {part.max + blind, part.sum + blind, part.acc + blind * shape_.padded}, unit.rows - blind,
               shape_.padded);
}

void Attention::FinishUnit(const Unit& unit, AttentionState total) const {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const int64_t head = unit.kv_head * shape_.group + row % shape_.group;
    kernel_.finish(RowOf(args_.out, unit.first_query + row / shape_.group, head * shape_.dim),
                   total.acc + row * shape_.padded, total.sum[row], shape_.dim);
  }
}

void Attention::RunUnits(ThreadTeam& team, char* scratch) {
  const size_t each = WorkspaceBytes(shape_, kernel_);
  std::atomic<int64_t> next = 0;
  auto work_on = [&](int worker) {
    const Workspace work = WorkspaceAt(shape_, kernel_, scratch + static_cast<size_t>(worker) * each);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < units_;) {
      const Unit unit = UnitAt(i);
      PackQueries(unit, work);
      AttendSegment(unit, 0, Limit(unit), work, work.total);
      for (int64_t segment = 1; segment < Segments(unit); ++segment) {
        AttendSegment(unit, segment, Limit(unit), work, work.part);
        FoldSegment(unit, segment, work.total, work.part);
      }
      FinishUnit(unit, work.total);
    }
  };
  if (multiplications_ < kWorthThreads) return work_on(0);
  team.Run([&](int worker, int) { work_on(worker); });
}

void Attention::RunSegments(ThreadTeam& team, char* scratch) {
  const size_t each = WorkspaceBytes(shape_, kernel_), state = StateBytes(shape_);
  char* const partial = scratch + each * static_cast<size_t>(team.size());
  auto state_of = [&](int64_t unit, int64_t segment) {
    return StateAt(shape_, partial + static_cast<size_t>(unit * most_segments_ + segment) * state);
  };
  std::atomic<int64_t> next = 0;
  team.Run([&](int worker, int) {
    const Workspace work = WorkspaceAt(shape_, kernel_, scratch + static_cast<size_t>(worker) * each);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < units_ * most_segments_;) {
      const Unit unit = UnitAt(i / most_segments_);
      const int64_t segment = i % most_segments_;
      if (segment >= Segments(unit)) continue;
      PackQueries(unit, work);
      AttendSegment(unit, segment, SegmentEnd(unit, segment), work, state_of(i / most_segments_, segment));
    }
  });
  ForRows(team, units_, shape_.tile_rows * shape_.padded * most_segments_, [&](int64_t i) {
    const Unit unit = UnitAt(i);
    const AttentionState total = state_of(i, 0);
    for (int64_t segment = 1; segment < Segments(unit); ++segment) {
      FoldSegment(unit, segment, total, state_of(i, segment));
    }
    FinishUnit(unit, total);
  });
}

void Attention::Run(ThreadTeam& team) {
  const size_t table = Align(static_cast<size_t>(sequences_) * sizeof(int64_t));
  const size_t workspaces = WorkspaceBytes(shape_, kernel_) * static_cast<size_t>(team.size());
  const size_t partial = static_cast<size_t>(units_ * most_segments_) * StateBytes(shape_);
  const bool apart = team.size() > 1 && most_segments_ > 1 && units_ < 4 * team.size() && partial <= kMostPartialBytes;
  char* scratch = static_cast<char*>(team.Scratch(table + workspaces + (apart ? partial : 0)));
  int64_t* unit_begin = reinterpret_cast<int64_t*>(scratch);
  int64_t begin = 0;
  for (int64_t b = 0; b < sequences_; ++b) {
    unit_begin[b] = begin;
    begin += Tiles(b) * shape_.kv_heads;
  }
  unit_begin_ = unit_begin;
  apart ? RunSegments(team, scratch + table) : RunUnits(team, scratch + table);
}

const AttentionKernel& KernelFor(const PagedAttentionArgs& args) {
  const Isa isa = CurrentIsa();
  if (args.k_pages.dtype == DType::kF32) return isa >= Isa::kAvx512 ? kAttentionF32Avx512 : kAttentionF32Avx2;
  if (isa >= Isa::kAvx512Bf16 && args.q.dtype == DType::kBF16) return kAttentionBf16Avx512Bf16;
  return isa >= Isa::kAvx512 ? kAttentionBf16Avx512 : kAttentionBf16Avx2;
}

}  // namespace

void PagedAttention(ThreadTeam& team, const PagedAttentionArgs& args) {
  Attention(args, KernelFor(args)).Run(team);
}

}  // namespace altiplano::cpu

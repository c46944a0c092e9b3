#include <algorithm>
#include <cstring>

#include "tests/kernels/cuda/ptx/lanes_testlib.h"
#include "tests/kernels/cuda/ptx/machine_block_testlib.h"

namespace altiplano::ptx_machine {

void Machine::IssueBox(const Instruction& in, uint32_t lane) {
  const auto word = [&](size_t i) { return Get<uint32_t>(warp_->registers, in.operands[i], lane); };
  BoxCopy box;
  box.in = &in;
  box.to = word(0);
  box.column = static_cast<int32_t>(word(2));
  box.row = static_cast<int32_t>(word(3));
  box.mbarrier = word(4);
  const auto map = Get<uint64_t>(warp_->registers, in.operands[1], lane);
  const auto* parameters = launch_.parameters.data();
  if (map < reinterpret_cast<uint64_t>(parameters) ||
      map + sizeof(TiledMatrix) > reinterpret_cast<uint64_t>(parameters) + launch_.parameters.size()) {
    return Fault(in, "a tensor map that is no parameter", static_cast<int>(lane));
  }
  std::memcpy(&box.matrix, reinterpret_cast<const void*>(map), sizeof box.matrix);
  const uint32_t bytes = box.matrix.box_rows * box.matrix.box_columns * 2;
  if (box.matrix.mark != TiledMatrix::kMark) return Fault(in, "no tensor map", static_cast<int>(lane));
  std::byte* to = Shared(in, box.to, bytes, lane);
  if (to == nullptr || Find(in, box.mbarrier, lane) == nullptr) return;
  if (box.to % 128 != 0) return Fault(in, "a box for a misaligned place", static_cast<int>(lane));
  std::memset(to, 0xff, bytes);
  block_->boxes.push_back(box);
}
// Rows of 128 bytes, of whose 16-byte pieces the place in shared memory decides the order.
void Machine::PerformBox(const BoxCopy& box) {
  const TiledMatrix& matrix = box.matrix;
  for (uint32_t i = 0; i < matrix.box_rows; ++i) {
    for (uint32_t j = 0; j < matrix.box_columns; ++j) {
      const int64_t row = int64_t{box.row} + i, column = int64_t{box.column} + j;
      uint16_t value = 0;
      if (row >= 0 && column >= 0 && row < static_cast<int64_t>(matrix.rows) &&
          column < static_cast<int64_t>(matrix.columns)) {
        const auto from = reinterpret_cast<uint64_t>(matrix.data) + static_cast<uint64_t>(row) * matrix.row_bytes +
                          static_cast<uint64_t>(column) * 2;
        const std::byte* found = Global(*box.in, from, 2, 0);
        if (found == nullptr) return;
        std::memcpy(&value, found, 2);
      }
      const uint64_t to = Swizzled(box.to + i * matrix.box_columns * 2 + j * 2);
      std::memcpy(block_->shared.data() + (to - kSharedBegin), &value, 2);
    }
  }
  Mbarrier& mbarrier = block_->mbarriers.at(box.mbarrier);
  mbarrier.bytes -= matrix.box_rows * matrix.box_columns * 2;
  Complete(mbarrier);
}
void Machine::IssueCopy(const Instruction& in, uint32_t lane) {
  const uint32_t to = Get<uint32_t>(warp_->registers, in.operands[0], lane);
  const auto from = Get<uint64_t>(warp_->registers, in.operands[1], lane);
  const uint32_t bytes = Get<uint32_t>(warp_->registers, in.operands[2], lane);
  if (to % 16 != 0 || from % 16 != 0) return Fault(in, "a misaligned copy", static_cast<int>(lane));
  if (bytes != 0 && bytes != 16) return Fault(in, "a copy of a part", static_cast<int>(lane));
  std::byte* memory = Shared(in, to, 16, lane);
  if (memory == nullptr || (bytes != 0 && Global(in, from, 16, lane) == nullptr)) return;
  std::memset(memory, 0xff, 16);
  warp_->copies.push_back({lane, to, from, bytes != 0, warp_->groups[lane]});
}
void Machine::PerformCopies(const Instruction& in, uint32_t lanes) {
  const auto due = [&](const AsyncCopy& copy) {
    return (lanes >> copy.lane & 1) != 0 && copy.group + static_cast<uint64_t>(in.offset) < warp_->groups[copy.lane];
  };
  for (const AsyncCopy& copy : warp_->copies) {
    if (!due(copy)) continue;
    std::byte* to = Shared(in, copy.to, 16, copy.lane);
    std::memset(to, 0, 16);
    if (copy.inside) std::memcpy(to, reinterpret_cast<const void*>(copy.from), 16);
  }
  std::erase_if(warp_->copies, due);
}

}  // namespace altiplano::ptx_machine

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/tensor.h"
#include "tests/kernels/cuda/ptx/lanes_testlib.h"
#include "tests/kernels/cuda/ptx/machine_block_testlib.h"

namespace altiplano::ptx_machine {
namespace {

// The lower element of a pair, or the upper one.
float Half(uint32_t pair, uint32_t which) {
  return ToFloat(BF16{static_cast<uint16_t>(pair >> (which * 16))});
}

// Element (row, column) of a warp's 16 x 16, of the pairs in its registers.
template <typename PairOf>
float ElementOfA(uint32_t row, uint32_t column, PairOf pair_of) {
  return Half(pair_of(row / 8 + column / 8 * 2, row % 8 * 4 + column % 8 / 2), column % 2);
}

// Elements of a warp's 16 rows of d: which of all, row by row, and where it lies.
template <typename Fn>
void ForElements(uint32_t columns, Fn fn) {
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < columns; ++column) {
      fn(size_t{row} * columns + column, column / 8 * 4 + row / 8 * 2 + column % 2, row % 8 * 4 + column % 8 / 2);
    }
  }
}

}  // namespace

void Machine::Mma(const Instruction& in) {
  const Register *d = &in.operands[0], *a = &in.operands[4], *b = &in.operands[8], *c = &in.operands[10];
  const auto of_a = [&](size_t i, uint32_t lane) { return Get<uint32_t>(warp_->registers, a[i], lane); };
  std::array<std::array<float, 8>, 16> sums{};
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < 8; ++column) {
      const uint32_t lane = row % 8 * 4 + column / 2;
      float sum = Get<float>(warp_->registers, c[row / 8 * 2 + column % 2], lane);
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t pair = Get<uint32_t>(warp_->registers, b[k / 8], column * 4 + k % 8 / 2);
        sum += ElementOfA(row, k, of_a) * Half(pair, k % 2);
      }
      sums[row][column] = sum;
    }
  }
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < 8; ++column) {
      Put(warp_->registers, d[row / 8 * 2 + column % 2], row % 8 * 4 + column / 2, sums[row][column]);
    }
  }
}

void Machine::LdMatrix(const Instruction& in) {
  for (uint32_t matrix = 0; matrix < 4; ++matrix) {
    std::array<std::array<uint16_t, 8>, 8> rows;
    for (uint32_t row = 0; row < 8; ++row) {
      const std::byte* memory = At(in, matrix * 8 + row, in.operands[4], 16);
      if (memory == nullptr) return;
      std::memcpy(rows[row].data(), memory, 16);
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = in.transposed ? rows[j][i] : rows[i][j];
      const uint32_t high = in.transposed ? rows[j + 1][i] : rows[i][j + 1];
      Put(warp_->registers, in.operands[matrix], lane, low | high << 16);
    }
  }
}

// ---- wgmma. A warp's 16 of the 64 rows. Nobody may touch its registers until it has been waited for: those of d hold
// NaNs until then, and those of a must be the same then. What threads wrote to them before must be behind a fence. What
// lies in shared memory is read at some moment until then.

constexpr uint32_t kUnderWay = 0x7fffdead;

void Machine::IssueProduct(const Instruction& in) {
  const size_t d_registers = in.count / 2;
  const Register *d = in.operands.data(), *a = d + d_registers, *after_a = a + (in.a_is_shared ? 1 : 4);
  const uint32_t first = static_cast<uint32_t>(std::countr_zero(warp_->live));
  Product product = {.in = &in,
                     .a_descriptor = in.a_is_shared ? Get<uint64_t>(warp_->registers, a[0], first) : 0,
                     .b_descriptor = Get<uint64_t>(warp_->registers, after_a[0], first),
                     .accumulate = Get<bool>(warp_->registers, after_a[1], first),
                     .group = warp_->product_groups,
                     .a = decltype(Product::a)(in.a_is_shared ? 0 : 4),
                     .sums = nullptr};
  for (size_t i = 0; i < product.a.size(); ++i) {
    std::memcpy(product.a[i].data(), warp_->registers + a[i], sizeof product.a[i]);
  }
  for (const Product& other : warp_->products) {
    if (other.in->operands[0] == d[0] && other.in->count == in.count) product.sums = other.sums;
  }
  const bool behind_others = product.sums != nullptr;
  const auto* fenced = reinterpret_cast<const std::byte*>(warp_->fenced.data());
  for (size_t i = behind_others ? d_registers : 0; i < d_registers + product.a.size(); ++i) {
    if (fenced == nullptr || std::memcmp(fenced + d[i], warp_->registers + d[i], kLanes * 4) != 0) {
      return Fault(in, "a register that was written since the last wgmma.fence");
    }
  }
  if (!behind_others) {
    product.sums = std::make_shared<std::vector<float>>(16 * in.count);
    ForElements(in.count, [&](size_t element, size_t i, uint32_t lane) {
      (*product.sums)[element] = Get<float>(warp_->registers, d[i], lane);
      Put(warp_->registers, d[i], lane, kUnderWay);
    });
  }
  warp_->products.push_back(std::move(product));
}

// As the descriptor says: start, leading and stride offsets in units of 16 bytes, swizzle 1 of 128 bytes.
bool Machine::ReadMatrix(const Instruction& in, uint64_t descriptor, bool mn_major, uint32_t begin, uint32_t end,
                         std::vector<float>* to) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    Fault(in, "a descriptor of another swizzle");
    return false;
  }
  const uint64_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  for (uint32_t mn = begin; mn < end; ++mn) {
    for (uint32_t k = 0; k < 16; ++k) {
      const uint64_t address = mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                        : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
      const std::byte* memory = Shared(in, Swizzled(address), 2, 0);
      if (memory == nullptr) return false;
      BF16 element;
      std::memcpy(&element, memory, sizeof element);
      to->push_back(ToFloat(element));
    }
  }
  return true;
}

void Machine::PerformProduct() {
  const Product product = std::move(warp_->products.front());
  warp_->products.pop_front();
  const Instruction& in = *product.in;
  const uint32_t columns = in.count;
  const Register *d = in.operands.data(), *a = d + columns / 2;
  for (size_t i = 0; i < product.a.size(); ++i) {
    if (std::memcmp(product.a[i].data(), warp_->registers + a[i], sizeof product.a[i]) != 0) {
      return Fault(in, "an operand that was written before the product was waited for");
    }
  }
  std::vector<float> rows, b;
  const uint32_t first_row = static_cast<uint32_t>(warp_->index) % 4 * 16;
  if (in.a_is_shared && !ReadMatrix(in, product.a_descriptor, false, first_row, first_row + 16, &rows)) return;
  for (uint32_t row = 0; row < 16 && !in.a_is_shared; ++row) {
    for (uint32_t k = 0; k < 16; ++k) {
      rows.push_back(ElementOfA(row, k, [&](size_t i, uint32_t lane) { return product.a[i][lane]; }));
    }
  }
  if (!ReadMatrix(in, product.b_descriptor, in.transposed, 0, columns, &b)) return;
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < columns; ++column) {
      float& of_element = (*product.sums)[row * columns + column];
      float sum = product.accumulate ? of_element : 0;
      for (uint32_t k = 0; k < 16; ++k) sum += rows[row * 16 + k] * b[column * 16 + k];
      of_element = sum;
    }
  }
  if (product.sums.use_count() > 1) return;  // others add to them
  bool touched = false;
  auto* fenced = reinterpret_cast<std::byte*>(warp_->fenced.data());
  ForElements(columns, [&](size_t element, size_t i, uint32_t lane) {
    touched |= Get<uint32_t>(warp_->registers, d[i], lane) != kUnderWay;
    Put(warp_->registers, d[i], lane, (*product.sums)[element]);
    Put(fenced, d[i], lane, (*product.sums)[element]);
  });
  if (touched) Fault(in, "a sum that was written before the product was waited for");
}

void Machine::WaitForProducts(uint64_t pending_groups) {
  const auto& products = warp_->products;
  while (error_.empty() && !products.empty() && products.front().group + pending_groups < warp_->product_groups) {
    PerformProduct();
  }
}

}  // namespace altiplano::ptx_machine

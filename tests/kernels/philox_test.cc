#include "kernels/cpu/philox.h"

#include <gtest/gtest.h>

#include <set>

namespace altiplano {
namespace {

// The three vectors that the authors of the algorithm publish with Random123 (tests/kat_vectors): zeros, ones, and the
// first hexadecimal digits of pi.
TEST(Philox, GivesThePublishedAnswers) {
  EXPECT_EQ(Philox4x32_10({0, 0, 0, 0}, 0), (PhiloxWords{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff),
            (PhiloxWords{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822),
            (PhiloxWords{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// A change of this layout changes what every seed generates.
TEST(Philox, SampleBitsAreTheLowWordsAtPositionAndSequence) {
  EXPECT_EQ(SampleBits(0, 0, 0), 0xe169c58d6627e8d5);
  const PhiloxWords words = Philox4x32_10({0x9abcdef0, 0x12345678, 7, 0}, 0x0123456789abcdef);
  EXPECT_EQ(SampleBits(0x0123456789abcdef, 0x123456789abcdef0, 7), uint64_t{words[1]} << 32 | words[0]);
}

TEST(Philox, SampleBitsDifferBySeedPositionAndSequence) {
  std::set<uint64_t> seen;
  size_t drawn = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (int64_t position : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1} << 32, int64_t{1} << 40}) {
      for (uint32_t sequence = 0; sequence < 5; ++sequence, ++drawn) seen.insert(SampleBits(seed, position, sequence));
    }
  }
  EXPECT_EQ(seen.size(), drawn);
}

}  // namespace
}  // namespace altiplano

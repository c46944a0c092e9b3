// The machine that runs PTX, held to the PTX ISA's tables and examples by programs that are written for it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/ptx/machine_testlib.h"

namespace altiplano::ptx_machine {
namespace {

using testing::Contains;
using testing::Each;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsNan;
using testing::Lt;

// A kernel with a pointer and a tensor map as its parameters. %rd1 is the pointer, %r1 the thread.
std::string Source(const std::string& body) {
  return R"(
.version 9.0
.target sm_90a
.address_size 64

.extern .shared .align 1024 .b8 dynamic[];
.visible .entry kernel(
  .param .u64 kernel_param_0,
  .param .align 64 .b8 kernel_param_1[128]
)
.maxntid 128, 1, 1
{
  .reg .pred %p<8>;
  .reg .b16 %rs<8>;
  .reg .f32 %f<80>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .shared .align 8 .b8 declared[1024];
  ld.param.u64 %rd0, [kernel_param_0];
  cvta.to.global.u64 %rd1, %rd0;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2; // this thread's word
)" + body +
         "\nret;\n}\n";
}

struct Ran {
  std::string error;
  std::vector<uint32_t> words;
};
float AsFloat(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

Ran RunSource(const std::string& body, std::vector<uint32_t> words, uint32_t threads = 32, uint64_t seed = 1,
              const TiledMatrix& matrix = {}) {
  std::vector<std::string> errors;
  const auto kernels = ReadPtx("test.ptx", Source(body), &errors);
  EXPECT_THAT(errors, IsEmpty());
  if (!errors.empty()) return {errors[0], {}};
  Launch launch = {
      .block = {threads, 1, 1}, .dynamic_shared_bytes = 24576, .parameters = {}, .memory = {}, .seed = seed};
  launch.parameters.resize(192);
  auto* data = words.data();
  std::memcpy(launch.parameters.data(), &data, sizeof data);
  std::memcpy(launch.parameters.data() + 64, &matrix, sizeof matrix);
  const auto add = [&](const void* begin, size_t bytes) {
    launch.memory.push_back({reinterpret_cast<uint64_t>(begin), reinterpret_cast<uint64_t>(begin) + bytes});
  };
  add(data, words.size() * 4);
  if (matrix.data != nullptr) add(matrix.data, matrix.rows * matrix.row_bytes);
  std::sort(launch.memory.begin(), launch.memory.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  std::string error = Run(kernels.at("kernel"), launch);
  return {std::move(error), std::move(words)};
}

// bf16 of small integers, two to a word.
uint32_t Pair(int low, int high) {
  const auto bits = [](int x) { return std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16; };
  return bits(low) | bits(high) << 16;
}

// d from %f0 on, a, b's descriptor %rd11, %p2: whether d is added to.
std::string Wgmma(int columns, const std::string& a, const std::string& transposed) {
  std::string d;
  for (int i = 0; i < columns / 2; ++i) d += (i == 0 ? "%f" : ", %f") + std::to_string(i);
  return "wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32.bf16.bf16 {" + d + "}, " + a +
         ", %rd11, %p2, 1, 1, " + transposed + ";";
}
// a %r10 to %r13.
std::string Wgmma(bool mn_major, int columns = 64) {
  return Wgmma(columns, "{%r10, %r11, %r12, %r13}", mn_major ? "1" : "0");
}

TEST(PtxMachine, LanesComputeAndStore) {
  const Ran ran = RunSource("mad.lo.s32 %r2, %r1, 3, -5; st.global.u32 [%rd3], %r2;", std::vector<uint32_t>(64), 64);
  EXPECT_EQ(ran.error, "");
  for (int i = 0; i < 64; ++i) EXPECT_EQ(static_cast<int>(ran.words[static_cast<size_t>(i)]), 3 * i - 5);
}

TEST(PtxMachine, OperationsRoundAndClampAsTheIsaSays) {
  const Ran ran = RunSource(R"(
  mov.f32 %f1, 0f3F804000; cvt.rn.bf16.f32 %rs1, %f1; cvt.u32.u16 %r2, %rs1; st.global.u32 [%rd1], %r2; // a tie, to even
  mov.f32 %f2, 0f3F81C000; cvt.rn.bf16x2.f32 %r3, %f2, %f1; st.global.u32 [%rd1+4], %r3; // the first is the upper half
  mov.u32 %r4, 33; mov.u32 %r5, -8; shr.s32 %r6, %r5, %r4; st.global.u32 [%rd1+8], %r6; // all of the sign
  shl.b32 %r7, %r5, %r4; st.global.u32 [%rd1+12], %r7;
  mov.f32 %f3, 0fFFFFFFFF; max.f32 %f4, %f3, %f1; st.global.f32 [%rd1+16], %f4; // the number
  setp.gt.f32 %p1, %f3, %f1; selp.u32 %r8, 1, 0, %p1; st.global.u32 [%rd1+20], %r8;
  setp.gtu.f32 %p2, %f3, %f1; selp.u32 %r9, 1, 0, %p2; st.global.u32 [%rd1+24], %r9;
  bfi.b32 %r10, 7, 0, 4, 2; st.global.u32 [%rd1+28], %r10;
  mov.u64 %rd4, 4294967297; mul.hi.u64 %rd5, %rd4, %rd4; cvt.u32.u64 %r11, %rd5; st.global.u32 [%rd1+32], %r11;
  mul.rn.f32 %f5, %f1, %f1; add.rn.f32 %f5, %f5, 0fBF808000; fma.rn.f32 %f6, %f1, %f1, 0fBF808000;
  st.global.f32 [%rd1+36], %f5; st.global.f32 [%rd1+40], %f6;)",
                            std::vector<uint32_t>(11), 1);
  EXPECT_EQ(ran.error, "");
  const float x = AsFloat(0x3f804000);
  EXPECT_THAT(ran.words, testing::ElementsAre(0x3f80, 0x3f823f80, 0xffffffff, 0, 0x3f804000, 0, 1, 0x30, 1,
                                              std::bit_cast<uint32_t>(static_cast<float>(x * x) - AsFloat(0x3f808000)),
                                              std::bit_cast<uint32_t>(std::fma(x, x, -AsFloat(0x3f808000)))));
}

TEST(PtxMachine, LanesThatTookOtherWaysMeetForAShuffle) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    // The upper half takes a longer way.
    const Ran ran = RunSource(R"(
  mov.u32 %r2, %r1; setp.lt.u32 %p1, %r1, 16; @%p1 bra $L_meet;
  add.s32 %r2, %r2, 100; setp.lt.u32 %p2, %r1, 24; @%p2 bra $L_meet;
  add.s32 %r2, %r2, 100;
$L_meet:
  shfl.sync.bfly.b32 %r3|%p3, %r2, 16, 31, -1; st.global.u32 [%rd3], %r3;)",
                              std::vector<uint32_t>(32), 32, seed);
    EXPECT_EQ(ran.error, "");
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t from = i ^ 16;
      EXPECT_EQ(ran.words[i], from + (from < 16 ? 0 : from < 24 ? 100U : 200U));
    }
  }
}

TEST(PtxMachine, SaysWhoWaitsForWhom) {
  EXPECT_THAT(RunSource("setp.lt.u32 %p1, %r1, 16; @%p1 bra $L_end; bar.warp.sync -1;\n$L_end:", {0}).error, IsEmpty());
  EXPECT_THAT(RunSource("setp.lt.u32 %p1, %r1, 16; @!%p1 bra $L_end;\nshfl.sync.idx.b32 %r2|%p2, %r1, 0, 31, -1; "
                        "bra $L_end2;\n$L_end: bar.warp.sync -1;\n$L_end2:",
                        {0})
                  .error,
              HasSubstr("lanes that wait for others"));
  EXPECT_THAT(RunSource("bar.sync 1, 64;", {0}).error, HasSubstr("deadlock"));
  EXPECT_THAT(RunSource("bar.sync 16;", {0}).error, HasSubstr("no such barrier"));
  EXPECT_THAT(RunSource("bar.sync 1, 48;", {0}).error, HasSubstr("no such barrier"));
  EXPECT_THAT(RunSource("bar.sync 1, 64;", {0}, 64).error, IsEmpty());
  EXPECT_THAT(RunSource("bar.sync 1, 32;", {0}, 64).error, IsEmpty());  // one after the other
  EXPECT_THAT(RunSource("setp.lt.u32 %p1, %r1, 8; @%p1 bar.sync 0;", {0}).error, HasSubstr("others skip"));
}

TEST(PtxMachine, RefusesAccessesOutsideOfMemory) {
  EXPECT_THAT(RunSource("st.global.u32 [%rd3], %r1;", std::vector<uint32_t>(31)).error,
              HasSubstr("0 bytes behind memory of 124"));
  EXPECT_THAT(RunSource("st.global.u32 [%rd3+2], %r1;", std::vector<uint32_t>(33)).error, HasSubstr("misaligned"));
  EXPECT_THAT(RunSource("ld.global.v2.u32 {%r2, %r3}, [%rd3];", std::vector<uint32_t>(40)).error,
              HasSubstr("misaligned"));
  EXPECT_THAT(RunSource("mov.u32 %r2, dynamic; st.shared.u32 [%r2+24576], %r1;", {0}).error, HasSubstr("outside"));
  EXPECT_THAT(RunSource("trap;", {0}).error, HasSubstr("test.ptx:24: a trap"));
}

TEST(PtxMachine, ReadsOnlyWhatItKnows) {
  const auto errors_of = [](const std::string& body) {
    std::vector<std::string> errors;
    ReadPtx("test.ptx", Source(body), &errors);
    return errors;
  };
  EXPECT_THAT(errors_of("popc.b32 %r2, %r1;"),
              testing::ElementsAre(HasSubstr("test.ptx:24: an instruction that is not")));
  EXPECT_THAT(errors_of("add.s32 %r2, %r1, %rd1;"), testing::ElementsAre(HasSubstr("another width")));
  EXPECT_THAT(errors_of("add.s32 %r2, %r1, %r99;"), testing::ElementsAre(HasSubstr("an operand that is not known")));
  EXPECT_THAT(errors_of("bra $L_nowhere;"), testing::ElementsAre(HasSubstr("no such label")));
  EXPECT_THAT(errors_of("$L_a: bra $L_a;\n$L_a: bra $L_a;"), testing::ElementsAre(HasSubstr("a label twice")));
  EXPECT_THAT(errors_of("ld.global.u32 %r2, [%rd1+many];"), testing::ElementsAre(HasSubstr("not a number")));
  // A first matrix that is transposed, more or fewer numbers, other columns, too few registers.
  EXPECT_THAT(errors_of(Wgmma(16, "%rd12", "0, 0") + Wgmma(128, "%rd12", "0, 1") + Wgmma(false, 16)), IsEmpty());
  for (const std::string& other :
       {Wgmma(16, "%rd12", "1, 0"), Wgmma(16, "%rd12", "0"), Wgmma(16, "%rd12", "0, 2"), Wgmma(24, "%rd12", "0, 0"),
        Wgmma(64, "{%r10, %r11, %r12, %r13}", "0, 0"), Wgmma(16, "{%r10, %r11}", "0")}) {
    EXPECT_THAT(errors_of(other), testing::ElementsAre(HasSubstr("test.ptx:24: an instruction that is not"))) << other;
  }
  EXPECT_THAT(errors_of("{ .reg .pred p; setp.eq.s32 p, %r1, 0; } { .reg .b32 p; mov.u32 p, 1; }"), IsEmpty());
}

TEST(PtxMachine, NamesLoseTheirHashes) {
  EXPECT_EQ(WithoutHashes("_GLOBAL__N__85096e76_9_sample_cu_795cd713Draw"),
            "_GLOBAL__N__00000000_9_sample_cu_00000000Draw");
}

// The ISA's "Matrix Fragments for mma.m16n8k16", by its group and thread in the group.
TEST(PtxMachine, MmaHasTheFragmentsOfTheIsa) {
  std::vector<uint32_t> words(32 * 10);
  const auto a = [](int row, int k) { return row * 3 - k; };
  const auto b = [](int k, int column) { return k % 5 - column; };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    uint32_t* of_lane = &words[static_cast<size_t>(lane) * 10];
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i % 2 == 0 ? 0 : 8), k = thread * 2 + (i < 2 ? 0 : 8);
      of_lane[i] = Pair(a(row, k), a(row, k + 1));
    }
    for (int i = 0; i < 2; ++i) {
      const int k = thread * 2 + 8 * i;
      of_lane[4 + i] = Pair(b(k, group), b(k + 1, group));
    }
  }
  const Ran ran = RunSource(R"(
  mul.wide.u32 %rd2, %r1, 40; add.s64 %rd3, %rd1, %rd2;
  ld.global.u32 %r2, [%rd3]; ld.global.u32 %r3, [%rd3+4]; ld.global.u32 %r4, [%rd3+8]; ld.global.u32 %r5, [%rd3+12];
  ld.global.u32 %r6, [%rd3+16]; ld.global.u32 %r7, [%rd3+20];
  mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%f1, %f2, %f3, %f4};
  st.global.f32 [%rd3+24], %f1; st.global.f32 [%rd3+28], %f2; st.global.f32 [%rd3+32], %f3; st.global.f32 [%rd3+36], %f4;)",
                            words);
  ASSERT_EQ(ran.error, "");
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      int sum = 1;
      for (int k = 0; k < 16; ++k) sum += a(row, k) * b(k, column);
      EXPECT_EQ(AsFloat(ran.words[static_cast<size_t>(lane) * 10 + 6 + static_cast<size_t>(i)]),
                static_cast<float>(sum));
    }
  }
}

// Matrix i in bytes 128 i of shared memory, its element (row, column) 64 i + 8 row + column.
TEST(PtxMachine, LdMatrixGivesPairsOfARowOrOfAColumn) {
  for (const bool transposed : {false, true}) {
    const Ran ran = RunSource(std::string(R"(
  mov.u32 %r2, declared; shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3; // this lane's row of 16 bytes
  shl.b32 %r5, %r1, 3; shl.b32 %r6, %r5, 16; or.b32 %r7, %r5, %r6; add.s32 %r8, %r7, 65536; // its first two elements
  add.s32 %r9, %r8, 131074; add.s32 %r10, %r9, 131074; add.s32 %r11, %r10, 131074;
  st.shared.v4.u32 [%r4], {%r8, %r9, %r10, %r11};
  bar.warp.sync -1;
  ldmatrix.sync.aligned.m8n8.x4)") +
                                  (transposed ? ".trans" : "") + R"(.shared.b16 {%r12, %r13, %r14, %r15}, [%r4];
  shl.b32 %r16, %r1, 4; cvt.u64.u32 %rd4, %r16; add.s64 %rd5, %rd1, %rd4;
  st.global.v4.u32 [%rd5], {%r12, %r13, %r14, %r15};)",
                              std::vector<uint32_t>(128));
    ASSERT_EQ(ran.error, "");
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const uint32_t i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = matrix * 64 + (transposed ? j * 8 + i : i * 8 + j);
        const uint32_t high = matrix * 64 + (transposed ? (j + 1) * 8 + i : i * 8 + j + 1);
        EXPECT_EQ(ran.words[lane * 4 + matrix], low | high << 16);
      }
    }
  }
}

TEST(PtxMachine, CopiesAreThereWhenTheyHaveBeenWaitedFor) {
  const std::string begin = R"(
  mov.u32 %r2, declared; shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3;
  cvt.u64.u32 %rd4, %r3; add.s64 %rd5, %rd1, %rd4;
  cp.async.cg.shared.global [%r4], [%rd5], 16, 16; cp.async.commit_group;
  cp.async.cg.shared.global [%r4], [%rd5], 16, 0; cp.async.commit_group;)";
  const std::string load = "ld.shared.u32 %r6, [%r4]; st.global.u32 [%rd5], %r6;";
  const std::vector<uint32_t> words(128, 7);
  const auto firsts = [](const Ran& ran) {
    std::vector<uint32_t> of;
    for (size_t i = 0; i < ran.words.size(); i += 4) of.push_back(ran.words[i]);
    return of;
  };
  // Two copies to one place: of the later, zeros that read nothing.
  EXPECT_THAT(firsts(RunSource(begin + load, words)), Each(~0U));
  EXPECT_THAT(firsts(RunSource(begin + "cp.async.wait_group 1;" + load, words)), Each(7U));
  EXPECT_THAT(firsts(RunSource(begin + "cp.async.wait_group 0;" + load, words)), Each(0U));
}

// One box of 64 columns and 16 rows, the last two of which are beyond the matrix.
TEST(PtxMachine, BoxesAreSwizzledAndTheirBytesCounted) {
  std::vector<uint16_t> matrix(14 * 64);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  const TiledMatrix tiled = {.data = reinterpret_cast<const std::byte*>(matrix.data()),
                             .rows = 14,
                             .columns = 64,
                             .row_bytes = 128,
                             .box_rows = 16,
                             .box_columns = 64};
  const auto body = [](const std::string& bytes) {
    return R"(
  mov.u32 %r2, declared; mov.u32 %r3, dynamic; mov.b64 %rd6, kernel_param_1; cvta.param.u64 %rd7, %rd6;
  setp.ne.u32 %p1, %r1, 0; mov.u32 %r5, 0;
  @%p1 bra $L_wait;
  mbarrier.init.shared::cta.b64 [%r2], 1;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], )" +
           bytes + R"(;
  cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r3], [%rd7, {%r5, %r5}], [%r2];
$L_wait:
  bar.warp.sync -1;
$L_again:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
  @!%p2 bra $L_again;
  shl.b32 %r6, %r1, 6; add.s32 %r7, %r3, %r6; cvt.u64.u32 %rd8, %r6; add.s64 %rd9, %rd1, %rd8; mov.u32 %r8, 0;
$L_next:
  ld.shared.u32 %r9, [%r7]; st.global.u32 [%rd9], %r9;
  add.s32 %r7, %r7, 4; add.s64 %rd9, %rd9, 4; add.s32 %r8, %r8, 1; setp.lt.s32 %p3, %r8, 16;
  @%p3 bra $L_next;)";
  };
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const Ran ran = RunSource(body("2048"), std::vector<uint32_t>(512), 32, seed, tiled);
    ASSERT_EQ(ran.error, "");
    for (uint32_t row = 0; row < 16; ++row) {
      for (uint32_t column = 0; column < 64; ++column) {
        const uint32_t piece = column / 8 ^ row % 8, word = ran.words[row * 32 + piece * 4 + column % 8 / 2];
        EXPECT_EQ(column % 2 == 0 ? word & 0xffff : word >> 16, row < 14 ? row * 64 + column + 1 : 0);
      }
    }
  }
  EXPECT_THAT(RunSource(body("2064"), std::vector<uint32_t>(512), 32, 1, tiled).error, HasSubstr("for an mbarrier"));
}

// b lies as TMA leaves it, 64 rows of 128 bytes of (row r, element e), r - 2 e, swizzled: K-major the rows are columns
// of b, MN-major they are its k. Four warps, each with 16 of the 64 rows of a.
TEST(PtxMachine, WgmmaFindsBByItsDescriptor) {
  for (const auto& [mn_major, columns] :
       {std::pair{false, 64}, {true, 64}, {false, 32}, {true, 32}, {false, 16}, {true, 16}}) {
    std::string ones, stores;
    for (int i = 0; i < columns / 2; ++i) {
      const std::string f = "%f" + std::to_string(i);
      ones += "mov.f32 " + f + ", 0f3F800000;";
      stores += "st.global.f32 [%rd9+" + std::to_string(i * 4) + "], " + f + ";";
    }
    std::vector<uint32_t> words(2048 + 128 * 36);
    for (uint32_t row = 0; row < 64; ++row) {
      for (uint32_t e = 0; e < 64; e += 2) {
        const int r = static_cast<int>(row), i = static_cast<int>(e);
        words[row * 32 + (e / 8 ^ row % 8) * 4 + e % 8 / 2] = Pair(r - 2 * i, r - 2 * (i + 1));
      }
    }
    const auto a = [](int row, int k) { return row % 7 - k; };
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < 4; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, k = thread % 4 * 2 + i / 2 * 8;
        words[2048 + static_cast<size_t>(thread) * 36 + static_cast<size_t>(i)] = Pair(a(row, k), a(row, k + 1));
      }
    }
    // k from 16 on: 32 bytes further in a row, or 16 rows further.
    const Ran ran = RunSource(ones + R"(
  mov.u32 %r2, dynamic; mov.u32 %r3, %r1;
$L_fill:
  shl.b32 %r4, %r3, 2; add.s32 %r5, %r2, %r4; cvt.u64.u32 %rd4, %r4; add.s64 %rd5, %rd1, %rd4;
  ld.global.u32 %r6, [%rd5]; st.shared.u32 [%r5], %r6; add.s32 %r3, %r3, 128; setp.lt.u32 %p1, %r3, 2048;
  @%p1 bra $L_fill;
  bar.sync 0;
  mul.wide.u32 %rd6, %r1, 144; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd7, 8192; add.s64 %rd9, %rd8, 16;
  ld.global.u32 %r10, [%rd8]; ld.global.u32 %r11, [%rd8+4]; ld.global.u32 %r12, [%rd8+8]; ld.global.u32 %r13, [%rd8+12];
  add.s32 %r14, %r2, )" + (mn_major ? "2048" : "32") +
                                  R"(;
  shr.u32 %r15, %r14, 4; cvt.u64.u32 %rd10, %r15; or.b64 %rd11, %rd10, 4611686293305294848; // a stride of 1024, swizzle 1
  mov.u32 %r16, 1; setp.ne.b32 %p2, %r16, 0;
  wgmma.fence.sync.aligned;)" + Wgmma(mn_major, columns) +
                                  "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" + stores,
                              words, 128);
    ASSERT_EQ(ran.error, "");
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < columns / 2; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        int sum = 1;
        for (int k = 16; k < 32; ++k) sum += a(row, k - 16) * (mn_major ? k - 2 * column : column - 2 * k);
        EXPECT_EQ(AsFloat(ran.words[2048 + static_cast<size_t>(thread) * 36 + 4 + static_cast<size_t>(i)]),
                  static_cast<float>(sum))
            << thread << " " << i;
      }
    }
  }
}

// a has 64 rows of 128 bytes, b behind it as many as columns, swizzled; k from 32 to 47 of them is multiplied. Each of
// four warps has the sums of 16 rows of a.
TEST(PtxMachine, WgmmaFindsBothByTheirDescriptors) {
  const auto a = [](int row, int k) { return row - 2 * k; };
  const auto b = [](int column, int k) { return (3 * column + 5 * k) % 11 - 5; };
  for (const int columns : {16, 32, 64, 128}) {
    const int filled = (64 + columns) * 32, results = columns / 2;
    std::vector<uint32_t> words(static_cast<size_t>(filled + 128 * results));
    for (int row = 0; row < filled / 32; ++row) {
      for (int k = 0; k < 64; k += 2) {
        words[static_cast<size_t>(row * 32 + (k / 8 ^ row % 8) * 4 + k % 8 / 2)] =
            row < 64 ? Pair(a(row, k), a(row, k + 1)) : Pair(b(row - 64, k), b(row - 64, k + 1));
      }
    }
    std::string stores;
    for (int i = 0; i < results; ++i) {
      stores += "st.global.f32 [%rd9+" + std::to_string(i * 4) + "], %f" + std::to_string(i) + ";";
    }
    const Ran ran = RunSource(R"(
  mov.u32 %r2, dynamic; mov.u32 %r3, %r1;
$L_fill:
  shl.b32 %r4, %r3, 2; add.s32 %r5, %r2, %r4; cvt.u64.u32 %rd4, %r4; add.s64 %rd5, %rd1, %rd4;
  ld.global.u32 %r6, [%rd5]; st.shared.u32 [%r5], %r6; add.s32 %r3, %r3, 128; setp.lt.u32 %p1, %r3, )" +
                                  std::to_string(filled) + R"(;
  @%p1 bra $L_fill;
  bar.sync 0;
  mul.wide.u32 %rd6, %r1, )" + std::to_string(results * 4) +
                                  "; add.s64 %rd7, %rd1, %rd6; add.s64 %rd9, %rd7, " + std::to_string(filled * 4) +
                                  R"(;
  add.s32 %r14, %r2, 64; shr.u32 %r15, %r14, 4; cvt.u64.u32 %rd10, %r15;
  or.b64 %rd12, %rd10, 4611686293305294848; add.s64 %rd11, %rd12, 512; // 8192 bytes further on
  mov.u32 %r16, 0; setp.ne.b32 %p2, %r16, 0;
  wgmma.fence.sync.aligned;)" + Wgmma(columns, "%rd12", "0, 0") +
                                  "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" + stores,
                              words, 128);
    ASSERT_EQ(ran.error, "");
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < results; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        int sum = 0;
        for (int k = 32; k < 48; ++k) sum += a(row, k) * b(column, k);
        EXPECT_EQ(AsFloat(ran.words[static_cast<size_t>(filled + thread * results + i)]), static_cast<float>(sum))
            << columns << " columns: " << row << ", " << column;
      }
    }
  }
}

// Of ones, so that a product adds 16 to each element.
TEST(PtxMachine, WgmmaIsUnderWayUntilItIsWaitedFor) {
  const std::string wgmma = Wgmma(false), fence = "wgmma.fence.sync.aligned;",
                    commit = "wgmma.commit_group.sync.aligned;";
  const std::string wait = "wgmma.wait_group.sync.aligned 0;", store = "st.global.f32 [%rd3], %f0;";
  const auto run = [&](const std::string& then) {
    std::string zeros;
    for (int i = 0; i < 32; ++i) zeros += "mov.f32 %f" + std::to_string(i) + ", 0f00000000;";
    const std::string begin = zeros + R"(
  mov.u32 %r2, dynamic; mov.u32 %r3, %r1; mov.u32 %r10, 1065369472; // two ones
  mov.u32 %r11, %r10; mov.u32 %r12, %r10; mov.u32 %r13, %r10;
$L_fill:
  shl.b32 %r4, %r3, 2; add.s32 %r5, %r2, %r4; st.shared.u32 [%r5], %r10; add.s32 %r3, %r3, 128;
  setp.lt.u32 %p1, %r3, 4096;
  @%p1 bra $L_fill;
  bar.sync 0;
  shr.u32 %r15, %r2, 4; cvt.u64.u32 %rd10, %r15; or.b64 %rd11, %rd10, 4611686293305294848;
  add.s64 %rd12, %rd11, 512; // of what lies 8192 bytes further on
  mov.u32 %r16, 1; setp.ne.b32 %p2, %r16, 0; mov.u32 %r17, 0;)";
    std::vector<std::string> errors;
    std::vector<float> sums;
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      const Ran ran = RunSource(begin + then, std::vector<uint32_t>(128), 128, seed);
      errors.push_back(ran.error);
      for (const uint32_t word : ran.words) sums.push_back(AsFloat(word));
    }
    return std::pair(errors, sums);
  };
  const auto sums = [&](const std::string& then) {
    const auto [errors, of] = run(then);
    EXPECT_THAT(errors, Each(IsEmpty()));
    return of;
  };
  const auto errors = [&](const std::string& then) { return run(then).first; };

  EXPECT_THAT(sums(fence + wgmma + commit + wait + store), Each(16));
  EXPECT_THAT(sums(fence + wgmma + wgmma + commit + wait + store), Each(32));
  EXPECT_THAT(sums(fence + wgmma + commit + wgmma + commit + wait + store), Each(32));
  const std::string add = "add.f32 %f0, %f0, 0f3F800000;";
  EXPECT_THAT(sums(fence + wgmma + commit + wait + add + fence + wgmma + commit + wait + store), Each(33));

  EXPECT_THAT(sums(fence + wgmma + commit + store), Contains(IsNan()));
  EXPECT_THAT(sums(fence + wgmma + wait + store), Contains(IsNan()));  // in no group
  EXPECT_THAT(sums(fence + wgmma + commit + wgmma + commit + "wgmma.wait_group.sync.aligned 1;" + store),
              Contains(IsNan()));
  // b is read late, too.
  EXPECT_THAT(sums(fence + wgmma + commit + "mad.lo.s32 %r5, %r1, 4, %r2; st.shared.u32 [%r5], %r17;" + wait + store),
              Contains(Lt(16)));

  EXPECT_THAT(errors(fence + wgmma + commit + "mov.u32 %r11, 0;" + wait), Contains(HasSubstr("an operand that was")));
  EXPECT_THAT(errors(fence + wgmma + commit + "mov.f32 %f3, 0f00000000;" + wait),
              Contains(HasSubstr("a sum that was")));
  const auto unfenced = Each(HasSubstr("since the last wgmma.fence"));
  EXPECT_THAT(errors(wgmma + commit + wait), unfenced);
  EXPECT_THAT(errors(fence + "mov.u32 %r11, 0;" + wgmma + commit + wait), unfenced);
  EXPECT_THAT(errors(fence + wgmma + commit + wait + add + wgmma + commit + wait), unfenced);

  // With a in shared memory.
  const std::string both = Wgmma(64, "%rd12", "0, 0");
  EXPECT_THAT(sums(fence + both + commit + wait + store), Each(16));
  EXPECT_THAT(sums(fence + both + both + wgmma + commit + wait + store), Each(48));
  EXPECT_THAT(sums(fence + both + commit + store), Contains(IsNan()));
  const std::string change = "mad.lo.s32 %r5, %r1, 4, %r2; st.shared.u32 [%r5+8192], %r17;";
  EXPECT_THAT(sums(fence + both + commit + change + wait + store), Contains(Lt(16)));
  EXPECT_THAT(sums(fence + both + commit + wait + "bar.sync 0;" + change + store), Each(16));
  EXPECT_THAT(errors(fence + both + commit + "mov.f32 %f3, 0f00000000;" + wait), Contains(HasSubstr("a sum that was")));
  EXPECT_THAT(errors(both + commit + wait), unfenced);
  EXPECT_THAT(errors("and.b64 %rd12, %rd12, 4611686018427387903;" + fence + both + commit + wait),
              Each(HasSubstr("another swizzle")));
}

TEST(PtxMachine, CountsIssueSlots) {
  const auto slots = [](const std::string& body) {
    const uint64_t before = IssueSlots();
    EXPECT_EQ(RunSource(body, std::vector<uint32_t>(64), 64).error, "");
    return IssueSlots() - before;
  };
  // Of two warps, both with what Source() and its end are made of.
  const uint64_t none = slots("");
  EXPECT_EQ(slots("add.s32 %r2, %r1, 1;"), none + 2);
  EXPECT_EQ(slots("mov.u32 %r2, %r1;"), none);
  EXPECT_EQ(slots("add.s64 %rd4, %rd1, 1;"), none + 4);
  EXPECT_EQ(slots("ld.global.u32 %r2, [%rd3];"), none + 2);
  EXPECT_EQ(slots("setp.eq.u32 %p1, %r1, 0; @%p1 add.s32 %r2, %r1, 1;"), none + 4);  // whoever it is for
}

}  // namespace
}  // namespace altiplano::ptx_machine

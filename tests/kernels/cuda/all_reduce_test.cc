// Kernels of several ranks that wait for each other: in the simulator each rank is a stream, its blocks interleaved
// with the others', its stores late; on a GPU the ranks are streams of one device.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/backend.h"
#include "kernels/cuda/peers.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

using cuda::Peers;
using cuda::PeerSignals;
using cuda::PeerVerdicts;

// Ranks with their streams and the memory that they lend each other.
class Ranks {
 public:
  Ranks(int n, uint32_t calls_before = 0) {
    peers_.resize(static_cast<size_t>(n));
    verdicts_ = static_cast<PeerVerdicts*>(cuda::AllocateShared(sizeof(PeerVerdicts)));
    PeerSignals start;
    std::memset(&start, 0, sizeof(start));
    start.calls = calls_before;
    for (auto& meeting : start.arrived) {
      for (auto& block : meeting) {
        for (uint32_t& from : block) from = calls_before;
      }
    }
    for (int rank = 0; rank < n; ++rank) {
      std::string error;
      streams_.push_back(Stream::Cuda(0, &error));
      EXPECT_NE(streams_.back(), nullptr) << error;
      signals_.push_back(Buffer::Allocate(Device::kCuda, sizeof(PeerSignals)));
      mailboxes_.push_back(Buffer::Allocate(Device::kCuda, kMailboxBytes));
      Copy(*streams_.back(), signals_.back().data(), Device::kCuda, &start, Device::kCpu, sizeof(start));
      EXPECT_EQ(streams_.back()->Synchronize(), "");
    }
    for (int rank = 0; rank < n; ++rank) {
      Peers& peers = peers_[static_cast<size_t>(rank)];
      peers.verdicts = verdicts_;
      peers.patience_ns = 10'000'000'000;
      peers.rank = rank;
      peers.ranks = n;
      for (size_t other = 0; other < peers_.size(); ++other) {
        peers.signals[other] = static_cast<PeerSignals*>(signals_[other].data());
        peers.mailbox[other] = static_cast<char*>(mailboxes_[other].data());
      }
    }
  }
  ~Ranks() { cuda::FreeShared(verdicts_); }

  size_t size() const { return peers_.size(); }
  Stream& stream(size_t rank) { return *streams_[rank]; }
  const Peers& peers(size_t rank) const { return peers_[rank]; }
  PeerVerdicts& verdicts() { return *verdicts_; }
  void set_patience(std::chrono::nanoseconds patience) {
    for (Peers& peers : peers_) peers.patience_ns = static_cast<uint64_t>(patience.count());
  }

  // What `enqueue` launches on each rank's stream, to its end. What the simulator says of it.
  std::string Run(const std::function<void(size_t rank)>& enqueue) {
#ifdef ALTIPLANO_ON_GPU
    for (size_t rank = 0; rank < size(); ++rank) enqueue(rank);
    for (auto& stream : streams_) {
      if (std::string error = stream->Synchronize(); !error.empty()) return error;
    }
    return "";
#else
    sim::Collect();
    for (size_t rank = 0; rank < size(); ++rank) enqueue(rank);
    return sim::RunCollected();
#endif
  }

 private:
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Buffer> signals_, mailboxes_;
  std::vector<Peers> peers_;
  PeerVerdicts* verdicts_;
};

// A tensor of each rank, on the host and on the device.
class Tensors {
 public:
  Tensors(Ranks& ranks, int64_t rows, int64_t columns, DType dtype, int64_t gap, uint32_t seed)
      : expected_(rows, columns, dtype) {
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      host_.push_back(std::make_unique<Matrix>(rows, columns, dtype, gap));
      host_.back()->FillNormal(seed + static_cast<uint32_t>(rank), 1000);
      device_.push_back(std::make_unique<OnDevice>(ranks.stream(rank), *host_.back()));
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        auto sum = static_cast<float>(host_[0]->at(i, j));
        for (size_t rank = 1; rank < host_.size(); ++rank) sum += static_cast<float>(host_[rank]->at(i, j));
        expected_.set(i, j, static_cast<double>(sum));
      }
    }
  }
  TensorView view(size_t rank) const { return device_[rank]->view(); }
  const Matrix& host(size_t rank) const { return *host_[rank]; }
  const Matrix& sum() const { return expected_; }
  void Fetch() {
    for (size_t rank = 0; rank < host_.size(); ++rank) device_[rank]->Fetch(*host_[rank]);
  }
  // Every rank holds the sum, bit for bit, and nothing beside it was touched.
  void ExpectSums() {
    Fetch();
    for (size_t rank = 0; rank < host_.size(); ++rank) {
      for (int64_t i = 0; i < expected_.rows(); ++i) {
        ASSERT_EQ(host_[rank]->RowBytes(i), expected_.RowBytes(i)) << "rank " << rank << ", row " << i;
      }
      EXPECT_TRUE(host_[rank]->GapsUntouched());
    }
  }

 private:
  std::vector<std::unique_ptr<Matrix>> host_;
  std::vector<std::unique_ptr<OnDevice>> device_;
  Matrix expected_;
};

class CudaAllReduceTest : public CudaTest {
 protected:
  // Each whim of the simulator's; a GPU has its own.
  void ForSeeds(uint64_t n, const std::function<void()>& fn) {
#ifdef ALTIPLANO_ON_GPU
    n = 1;
#endif
    for (uint64_t seed = 1; seed <= n && !HasFailure(); ++seed) {
#ifndef ALTIPLANO_ON_GPU
      SCOPED_TRACE(testing::Message() << "seed " << seed);
      sim::SetSeed(seed);
#endif
      fn();
    }
  }
};

TEST_F(CudaAllReduceTest, SumsInTheOrderOfRanksAndRoundsOnce) {
  struct Case {
    int ranks;
    int64_t rows, columns, gap;
  };
  const Case cases[] = {{1, 2, 8, 0},
                        {2, 3, 64, 0},
                        {2, 1, 1, 0},
                        {3, 5, 33, 2},
                        {5, 2, 7, 1},
                        {8, 2, 40, 0},
                        {8, 1, 3, 0},
                        {2, 3, 1500, 4},
                        {3, 1, 4100, 0},
                        // A thread has several packs, of one element or four.
                        {2, 1, 16403, 0},
                        {2, 1, 65612, 0}};
  std::map<int, std::unique_ptr<Ranks>> groups;
  for (const Case& c : cases) {
    if (kUnderTsan && c.columns > 1000) continue;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (bool twice : {false, true}) {
        SCOPED_TRACE(testing::Message() << c.ranks << " ranks, " << c.rows << " x " << c.columns << ", " << Name(dtype)
                                        << (twice ? ", two shots" : ", one shot"));
        if (groups[c.ranks] == nullptr) groups[c.ranks] = std::make_unique<Ranks>(c.ranks);
        Ranks& ranks = *groups[c.ranks];
        ForSeeds(kUnderTsan || c.columns > 10000 ? 1 : 2, [&] {
          Tensors x(ranks, c.rows, c.columns, dtype, c.gap, 7);
          ASSERT_EQ(ranks.Run([&](size_t rank) {
            (twice ? cuda::AllReduceTwoShots : cuda::AllReduceOneShot)(ranks.stream(rank), ranks.peers(rank),
                                                                       x.view(rank));
          }),
                    "");
          x.ExpectSums();
        });
      }
    }
  }
}

// Calls of all kinds and sizes behind each other, ranks running ahead as far as the protocol lets them: memory that is
// used again too early, or flags that are mistaken for another call's, show as wrong sums. Numbers of calls wrap.
TEST_F(CudaAllReduceTest, CallsFollowEachOtherWithoutMixing) {
  constexpr int kCalls = 10;
  for (int n : {2, 3, 8}) {
    SCOPED_TRACE(n);
    Ranks ranks(n, 0xFFFFFFFB);
    ForSeeds(kUnderTsan ? 2
             : n == 8   ? 4
                        : 24,
             [&] {
               std::mt19937 random(static_cast<uint32_t>(n));
               std::vector<std::unique_ptr<Tensors>> x;
               std::vector<int> way;
               for (int call = 0; call < kCalls; ++call) {
                 const bool large = n < 8 && random() % 4 == 0;
                 way.push_back(static_cast<int>(random() % 3));
                 x.push_back(std::make_unique<Tensors>(ranks, 1, large ? 2100 : 1 + random() % 90, DType::kF32, 0,
                                                       static_cast<uint32_t>(100 * call)));
               }
               ASSERT_EQ(ranks.Run([&](size_t rank) {
                 for (size_t call = 0; call < x.size(); ++call) {
                   Stream& stream = ranks.stream(rank);
                   const TensorView view = x[call]->view(rank);
                   if (way[call] == 0) cuda::AllReduceOneShot(stream, ranks.peers(rank), view);
                   if (way[call] == 1) cuda::AllReduceTwoShots(stream, ranks.peers(rank), view);
                   if (way[call] == 2) cuda::PeerBroadcast(stream, ranks.peers(rank), view);
                 }
               }),
                         "");
               for (size_t call = 0; call < x.size(); ++call) {
                 SCOPED_TRACE(testing::Message() << "call " << call << ", way " << way[call]);
                 if (way[call] < 2) {
                   x[call]->ExpectSums();
                   continue;
                 }
                 const std::string sent = x[call]->host(0).RowBytes(0);
                 x[call]->Fetch();
                 for (size_t rank = 0; rank < ranks.size(); ++rank)
                   EXPECT_EQ(x[call]->host(rank).RowBytes(0), sent) << rank;
               }
             });
  }
}

TEST_F(CudaAllReduceTest, FusedWithResidualAndNormGivesTheSameBits) {
  struct Case {
    size_t ranks;
    int64_t rows, width;
  };
  // In the last of each number of ranks a thread has several packs, more than are on their way at once but with two.
  const Case cases[] = {{3, 3, 96}, {3, 17, 260}, {3, 2, 7},  {3, 1, 520}, {3, 1, 8712},
                        {2, 3, 96}, {2, 1, 4500}, {8, 2, 40}, {8, 1, 4500}};
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [n, rows, width] : cases) {
      SCOPED_TRACE(testing::Message() << n << " ranks, " << rows << " x " << width << ", " << Name(dtype));
      if (kUnderTsan && (rows > kMostPeerBlocks || width > 1000)) continue;  // more fibers than it has room for
      Ranks ranks(static_cast<int>(n));
      ForSeeds(kUnderTsan || width > 1000 ? 1 : 3, [&] {
        Tensors fused_x(ranks, rows, width, dtype, 0, 5), plain_x(ranks, rows, width, dtype, 0, 5);
        Matrix residual(rows, width, DType::kF32), weight(1, width, DType::kF32), out(rows, width, dtype);
        residual.FillNormal(1, 1000);
        weight.FillNormal(2);
        std::vector<std::unique_ptr<OnDevice>> residuals[2], outs[2];
        const OnDevice d_weight(stream(), weight);
        for (auto& list : residuals) {
          for (size_t rank = 0; rank < n; ++rank) list.push_back(std::make_unique<OnDevice>(stream(), residual));
        }
        for (auto& list : outs) {
          for (size_t rank = 0; rank < n; ++rank) list.push_back(std::make_unique<OnDevice>(stream(), out));
        }
        ASSERT_EQ(stream().Synchronize(), "");
        const auto args = [&](size_t way, size_t rank, const TensorView& x) {
          return AddRmsNormArgs{.out = outs[way][rank]->view(),
                                .residual = residuals[way][rank]->view(),
                                .x = x,
                                .weight = d_weight.vector(),
                                .eps = 1e-5f};
        };
        ASSERT_EQ(ranks.Run([&](size_t rank) {
          cuda::AllReduceAddRmsNorm(ranks.stream(rank), ranks.peers(rank), args(0, rank, fused_x.view(rank)));
          cuda::AllReduceOneShot(ranks.stream(rank), ranks.peers(rank), plain_x.view(rank));
        }),
                  "");
        for (size_t rank = 0; rank < n; ++rank) {
          AddRmsNorm(ranks.stream(rank), args(1, rank, plain_x.view(rank)));
          ASSERT_EQ(ranks.stream(rank).Synchronize(), "");  // what follows is fetched by another stream
          Matrix bits[2][2] = {{{rows, width, dtype}, {rows, width, DType::kF32}},
                               {{rows, width, dtype}, {rows, width, DType::kF32}}};
          for (size_t way : {0, 1}) {
            outs[way][rank]->Fetch(bits[way][0]);
            residuals[way][rank]->Fetch(bits[way][1]);
          }
          for (int64_t i = 0; i < rows; ++i) {
            EXPECT_EQ(bits[0][0].RowBytes(i), bits[1][0].RowBytes(i)) << "out, rank " << rank << ", row " << i;
            EXPECT_EQ(bits[0][1].RowBytes(i), bits[1][1].RowBytes(i)) << "residual, rank " << rank << ", row " << i;
          }
        }
      });
    }
  }
}

TEST_F(CudaAllReduceTest, GatherPutsColumnsSideBySide) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64}) {
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 16}, {2, 5}, {1, 6}}) {
      for (bool in_place : {false, true}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << columns << ", " << Name(dtype) << ", " << in_place);
        Ranks ranks(3);
        ForSeeds(kUnderTsan ? 1 : 3, [&] {
          Tensors x(ranks, rows, columns, dtype, 1, 3), out(ranks, rows, 3 * columns, dtype, 2, 50);
          // Rank 2 gives without taking.
          ASSERT_EQ(ranks.Run([&](size_t rank) {
            const TensorView whole = rank == 2 ? TensorView() : out.view(rank);
            const bool place = in_place && rank != 2;
            cuda::PeerGather(ranks.stream(rank), ranks.peers(rank), whole,
                             place ? whole.columns(static_cast<int64_t>(rank) * columns, columns) : x.view(rank));
          }),
                    "");
          std::vector<std::string> given(3);
          for (int64_t i = 0; i < rows; ++i) {
            std::string expected;
            for (size_t rank = 0; rank < 3; ++rank) {
              const size_t bytes = static_cast<size_t>(columns) * SizeOf(dtype);
              expected += in_place && rank != 2 ? out.host(rank).RowBytes(i).substr(rank * bytes, bytes)
                                                : x.host(rank).RowBytes(i);
            }
            given[static_cast<size_t>(i)] = expected;
          }
          out.Fetch();
          for (size_t rank : {0, 1}) {
            for (int64_t i = 0; i < rows; ++i) EXPECT_EQ(out.host(rank).RowBytes(i), given[static_cast<size_t>(i)]);
            EXPECT_TRUE(out.host(rank).GapsUntouched());
          }
        });
      }
    }
  }
}

// ---- nobody waits for ever

TEST_F(CudaAllReduceTest, ARankThatDoesNotComeIsNamed) {
  for (bool twice : {false, true}) {
    ForSeeds(4, [&] {
      Ranks ranks(3);
      ranks.set_patience(std::chrono::milliseconds(50));
      Tensors x(ranks, 1, 40, DType::kF32, 0, 1), y(ranks, 1, 40, DType::kF32, 0, 1);
      ASSERT_EQ(ranks.Run([&](size_t rank) {
        if (rank == 1) return;
        (twice ? cuda::AllReduceTwoShots : cuda::AllReduceOneShot)(ranks.stream(rank), ranks.peers(rank), x.view(rank));
        cuda::AllReduceOneShot(ranks.stream(rank), ranks.peers(rank), y.view(rank));
      }),
                "");
      const PeerVerdicts& verdicts = ranks.verdicts();
      EXPECT_TRUE(verdicts.rank[0] == cuda::kGaveUpOn + 1 || verdicts.rank[2] == cuda::kGaveUpOn + 1);
      for (size_t rank : {0, 2}) EXPECT_NE(verdicts.rank[rank], 0u);
      EXPECT_EQ(verdicts.rank[1], 0u);
      // Whoever comes late finds the others' flags of the first call, and does not wait for those of the second.
      ASSERT_EQ(ranks.Run([&](size_t rank) {
        for (int call = 0; rank == 1 && call < 2; ++call) {
          cuda::AllReduceOneShot(ranks.stream(rank), ranks.peers(rank), x.view(rank));
        }
      }),
                "");
      EXPECT_EQ(verdicts.rank[1], cuda::kLeft);
    });
  }
}

TEST_F(CudaAllReduceTest, TheHostEndsAWait) {
  Ranks ranks(2);
  ranks.set_patience(std::chrono::hours(1'000'000));
  Tensors x(ranks, 1, 40, DType::kF32, 0, 1);
  ranks.verdicts().aborted = 1;
  ASSERT_EQ(ranks.Run([&](size_t rank) {
    if (rank == 0) cuda::AllReduceOneShot(ranks.stream(rank), ranks.peers(rank), x.view(rank));
  }),
            "");
  EXPECT_EQ(ranks.verdicts().rank[0], cuda::kLeft);
}

#if !defined(ALTIPLANO_ON_GPU) && !defined(__SANITIZE_THREAD__)
TEST_F(CudaAllReduceTest, TrafficIsCoalescedAndWhatTheWaysPromise) {
  constexpr int64_t kBytes = 4 * 4096;
  struct Case {
    const char* kernel;
    bool twice;
    int64_t loads, stores;  // of messages
  };
  // One shot reads its own message and everybody's; two read the own one, a share of everybody's and all sums.
  for (const Case& c : {Case{"AllReduceOneShot", false, 1 + 4, 2}, Case{"AllReduceTwoShots", true, 1 + 1 + 1, 2}}) {
    Ranks ranks(4);
    Tensors x(ranks, 1, 4096, DType::kF32, 0, 1);
    sim::CountTraffic(true);
    ASSERT_EQ(ranks.Run([&](size_t rank) {
      (c.twice ? cuda::AllReduceTwoShots : cuda::AllReduceOneShot)(ranks.stream(rank), ranks.peers(rank), x.view(rank));
    }),
              "");
    const sim::Traffic traffic = sim::TrafficOf(c.kernel);
    sim::CountTraffic(false);
    EXPECT_EQ(traffic.launches, 4u);
    const int64_t sums = c.twice ? kBytes : 0;  // each rank stores a quarter of them
    constexpr int64_t kNumbers = 4 * 1024 * 4;  // every thread loads the number of the call
    constexpr double kFlags = 0.05 * 4 * kBytes;
    EXPECT_NEAR(static_cast<double>(traffic.load_bytes), static_cast<double>(4 * c.loads * kBytes + kNumbers), kFlags);
    EXPECT_NEAR(static_cast<double>(traffic.store_bytes), static_cast<double>(4 * c.stores * kBytes + sums), kFlags);
    EXPECT_LT(traffic.sectors, traffic.ideal_sectors * 102 / 100);
  }
}
#endif

}  // namespace
}  // namespace altiplano

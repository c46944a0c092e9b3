// Ranks as threads. A collective has three parts: all meet and lay out what they brought; each works on its share of
// everybody's memory; all meet again before anyone may leave.
//
// After an abort a rank may leave early, but only when nobody is at work: others may be reading its tensors.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels/comm/communicator.h"
#include "kernels/comm/die.h"

namespace altiplano {

bool Communicator::AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) {
  if (!AllReduceSum(stream, args.x)) return false;
  AddRmsNorm(stream, args);
  return true;
}

bool Communicator::AllocateSummed(const Stream&, size_t, void** memory) {
  *memory = nullptr;
  return true;
}

bool Communicator::CheckSame(std::string_view, uint64_t) {
  return true;
}

namespace {

// What a rank brings to a meeting.
struct Contribution {
  TensorView x;
};

class ThreadGroup {
 public:
  ThreadGroup(int ranks, std::chrono::milliseconds patience)
      : patience_(patience), contributions_(static_cast<size_t>(ranks)), present_(static_cast<size_t>(ranks)) {}

  int size() const { return static_cast<int>(contributions_.size()); }

  // work(contributions of all ranks) runs on every rank between the two meetings.
  template <typename Work>
  bool Collective(int rank, const Contribution& mine, Work&& work) {
    std::unique_lock lock(mutex_);
    contributions_[static_cast<size_t>(rank)] = mine;
    bool together = Meet(rank, lock) && !aborted();  // nobody who sees the abort begins to work
    if (together) {
      ++working_;
      lock.unlock();
      work(contributions_);
      lock.lock();
      if (--working_ == 0) changed_.notify_all();
      together = Meet(rank, lock);
    }
    // Having met twice, all work is done. Otherwise those at work end by themselves: they wait for nothing.
    if (!together) changed_.wait(lock, [&] { return working_ == 0; });
    return together;
  }

  void Abort(std::string_view reason) {
    std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = reason;
    changed_.notify_all();
  }
  std::string error() const {
    std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  // Waits for all ranks; false when the group was aborted before the last came.
  bool Meet(int rank, std::unique_lock<std::mutex>& lock) {
    if (aborted()) return false;
    present_[static_cast<size_t>(rank)] = true;
    const uint64_t meeting = meetings_;
    if (++arrived_ == size()) {
      arrived_ = 0;
      present_.assign(present_.size(), false);
      ++meetings_;
      changed_.notify_all();
      return true;
    }
    if (!changed_.wait_for(lock, patience_, [&] { return meetings_ != meeting || aborted(); })) {
      error_ = "no word for " + std::to_string(patience_.count()) + " ms from rank";
      for (size_t other = 0; other < present_.size(); ++other) {
        if (!present_[other]) error_ += " " + std::to_string(other);
      }
      changed_.notify_all();
    }
    return meetings_ != meeting;
  }
  bool aborted() const { return !error_.empty(); }

  const std::chrono::milliseconds patience_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Contribution> contributions_;  // each written by its rank before the first meeting, read until the second
  uint64_t meetings_ = 0;                    // guarded by mutex_, as all that follows
  int arrived_ = 0;
  std::vector<bool> present_;  // who has arrived
  int working_ = 0;
  std::string error_;  // not empty: aborted
};

int64_t Rows(const TensorView& x) {
  return x.rank == 1 ? 1 : x.dim(0);
}
int64_t Columns(const TensorView& x) {
  return x.dim(x.rank - 1);
}

// Columns [begin, end) of a row: the sum over ranks, written back to all of them.
template <typename T>
void SumColumns(const std::vector<Contribution>& ranks, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 256;
  float sum[kBlock];
  for (int64_t base = begin; base < end; base += kBlock) {
    const int64_t n = std::min(kBlock, end - base);
    for (size_t r = 0; r < ranks.size(); ++r) {
      const T* x = ranks[r].x.row<T>(row) + base;
      for (int64_t i = 0; i < n; ++i) sum[i] = r == 0 ? ToFloat(x[i]) : sum[i] + ToFloat(x[i]);
    }
    for (const Contribution& rank : ranks) {
      T* x = rank.x.row<T>(row) + base;
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          x[i] = sum[i];
        } else {
          x[i] = ToBF16(sum[i]);
        }
      }
    }
  }
}

class InProcess : public Communicator {
 public:
  InProcess(std::shared_ptr<ThreadGroup> group, int rank) : group_(std::move(group)), rank_(rank) {}
  ~InProcess() override { group_->Abort("a rank has left"); }

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  void Abort(std::string_view reason) override { group_->Abort(reason); }
  std::string error() const override { return group_->error(); }

  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    if (x.device != Device::kCpu || x.rank < 1 || x.rank > 2 || (x.dtype != DType::kF32 && x.dtype != DType::kBF16)) {
      Die("AllReduceSum: wants an f32 or bf16 vector or matrix on the CPU");
    }
    if (!stream.Synchronize().empty()) return false;
    return group_->Collective(rank_, {.x = x}, [&](const std::vector<Contribution>& ranks) {
      const int64_t rows = Rows(x), columns = Columns(x);
      for (const Contribution& other : ranks) {
        if (Rows(other.x) != rows || Columns(other.x) != columns || other.x.dtype != x.dtype) {
          Die("AllReduceSum: the ranks brought different shapes or dtypes");
        }
      }
      // Shares of the columns, on cache lines so that ranks do not write to one line.
      const int64_t share = (columns + size() - 1) / size() + 31;
      const int64_t begin = std::min(columns, rank_ * (share / 32 * 32));
      const int64_t end = std::min(columns, begin + share / 32 * 32);
      for (int64_t row = 0; row < rows; ++row) {
        if (x.dtype == DType::kF32) {
          SumColumns<float>(ranks, row, begin, end);
        } else {
          SumColumns<BF16>(ranks, row, begin, end);
        }
      }
    });
  }

  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    const bool takes = !out.empty();
    if (x.device != Device::kCpu || x.rank != 2 ||
        (takes && (out.rank != 2 || out.dtype != x.dtype || out.dim(0) != x.dim(0)))) {
      Die("AllGather: wants matrices of the same dtype and number of rows on the CPU");
    }
    if (!stream.Synchronize().empty()) return false;
    // Each rank fills its own `out`: memory of others is only read.
    return group_->Collective(rank_, {.x = x}, [&](const std::vector<Contribution>& ranks) {
      if (!takes) return;
      int64_t column = 0;
      const auto element = static_cast<int64_t>(SizeOf(x.dtype));
      for (const Contribution& other : ranks) {
        const TensorView& from = other.x;
        if (from.dim(0) != out.dim(0) || from.dtype != out.dtype || column + from.dim(1) > out.dim(1)) {
          Die("AllGather: the ranks' parts do not fit side by side in out");
        }
        for (int64_t row = 0; row < out.dim(0); ++row) {
          char* to = out.row<char>(0) + (row * out.stride0 + column) * element;
          const char* source = from.row<char>(0) + row * from.stride0 * element;
          if (to != source) std::memcpy(to, source, static_cast<size_t>(from.dim(1) * element));
        }
        column += from.dim(1);
      }
      if (column != out.dim(1)) Die("AllGather: the ranks' parts do not fill out");
    });
  }

  bool Broadcast(Stream& stream, const TensorView& x) override {
    if (x.device != Device::kCpu || !x.contiguous()) Die("Broadcast: wants a dense tensor on the CPU");
    if (!stream.Synchronize().empty()) return false;
    return group_->Collective(rank_, {.x = x}, [&](const std::vector<Contribution>& ranks) {
      const TensorView& from = ranks[0].x;
      if (from.dtype != x.dtype || from.elements() != x.elements()) {
        Die("Broadcast: the ranks brought different shapes or dtypes");
      }
      const size_t bytes = static_cast<size_t>(x.elements()) * SizeOf(x.dtype);
      if (rank_ != 0 && bytes > 0) std::memcpy(x.data, from.data, bytes);
    });
  }

 private:
  const std::shared_ptr<ThreadGroup> group_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeInProcessGroup(int ranks, std::chrono::milliseconds patience) {
  if (ranks < 1) Die("MakeInProcessGroup: wants at least one rank");
  auto group = std::make_shared<ThreadGroup>(ranks, patience);
  std::vector<std::unique_ptr<Communicator>> members;
  for (int rank = 0; rank < ranks; ++rank) members.push_back(std::make_unique<InProcess>(group, rank));
  return members;
}

}  // namespace altiplano

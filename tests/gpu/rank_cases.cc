#include "tests/gpu/rank_cases.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "kernels/comm/all_reduce_plan.h"
#include "kernels/comm/communicator.h"
#include "kernels/ops.h"
#include "server/base/strings.h"
#include "server/model/config.h"
#include "tests/gpu/gpu_timer.h"

namespace altiplano::gpu {

namespace {

// A rank that does not come has failed; kernels of several ranks on one GPU that do not find room together, too.
constexpr auto kPatience = std::chrono::seconds(10);

struct Call {
  int ranks;
  bool apart;  // each on a GPU of its own
  int64_t tokens, hidden;
  bool norm;  // AddRmsNorm in the same kernel
  size_t message_bytes() const { return static_cast<size_t>(tokens * hidden) * SizeOf(DType::kF32); }
};

// By all ranks together, each byte of a mailbox, too, which L2 may keep.
double BytesMoved(const Call& call) {
  const double ranks = call.ranks, message = static_cast<double>(call.message_bytes());
  if (ChooseAllReduce(call.ranks, call.message_bytes(), false) == AllReduceWay::kTwoShots) {
    return message * ranks * (3 + 2 + 1 / ranks);  // read: the own message, shares, sums; one share of sums stored
  }
  const double one_shot = 1 + 1 + ranks;  // its own message, laid out; all messages
  // The sum; or the residual, read and stored, and what is normed, in bf16.
  return message * ranks * (one_shot + (call.norm ? 2.5 : 1));
}

// What one rank brings to its calls.
class Rank {
 public:
  Rank(Communicator& member, Stream& stream, const Call& call)
      : member_(member),
        stream_(stream),
        call_(call),
        memory_(Buffer::Allocate(stream, 3 * call.message_bytes() + static_cast<size_t>(call.hidden) * 4)) {
    if (!memory_) return;
    char* next = static_cast<char*>(memory_.data());
    const auto take = [&](DType dtype, int64_t rows) {
      const TensorView view = TensorView::Make(next, dtype, {rows, call.hidden}, Device::kCuda);
      next += static_cast<size_t>(rows * call.hidden) * SizeOf(dtype);
      return view;
    };
    x_ = take(DType::kF32, call.tokens);
    residual_ = take(DType::kF32, call.tokens);
    out_ = take(DType::kBF16, call.tokens);
    weight_ = TensorView::Make(next, DType::kF32, {call.hidden}, Device::kCuda);
  }
  explicit operator bool() const { return static_cast<bool>(memory_); }

  bool Issue() {
    if (!call_.norm) return member_.AllReduceSum(stream_, x_);
    return member_.AllReduceAddRmsNorm(stream_,
                                       {.out = out_, .residual = residual_, .x = x_, .weight = weight_, .eps = 1e-5f});
  }
  // Everybody brings ones to the next call.
  void FillWithOnes() {
    const std::vector<float> ones(static_cast<size_t>(x_.elements()), 1);
    Zero(stream_, memory_.data(), memory_.bytes());
    Copy(stream_, x_.data, Device::kCuda, ones.data(), Device::kCpu, call_.message_bytes());
    stream_.Synchronize();  // `ones` end here; errors stick
  }
  // Empty, or what is wrong with their sum. From then on zeros are summed: sums of sums would grow beyond all numbers.
  std::string CheckSum() {
    std::vector<float> sums(static_cast<size_t>(x_.elements()));
    Copy(stream_, sums.data(), Device::kCpu, (call_.norm ? residual_ : x_).data, Device::kCuda, call_.message_bytes());
    Zero(stream_, memory_.data(), memory_.bytes());
    if (std::string error = stream_.Synchronize(); !error.empty()) return error;
    for (const float sum : sums) {
      if (sum != static_cast<float>(call_.ranks)) {
        return StrCat("the sum of ", call_.ranks, " ones is ", static_cast<double>(sum));
      }
    }
    return "";
  }

 private:
  Communicator& member_;
  Stream& stream_;
  const Call call_;
  Buffer memory_;
  TensorView x_, residual_, out_, weight_;
};

// Times one call of all ranks. Every rank's thread goes through the same meetings, whatever fails.
class RankTimer {
 public:
  RankTimer(const Call& call, const Effort& effort)
      : call_(call),
        effort_(effort),
        meeting_(call.ranks),
        seconds_(static_cast<size_t>(call.ranks)),
        errors_(static_cast<size_t>(call.ranks)) {
    for (int rank = 0; rank < call.ranks; ++rank) ordinals_.push_back(call.apart ? rank : 0);
  }

  Time Measure() {
    Time time;
    group_ = MakeCudaGroup({.ordinals = ordinals_, .patience = kPatience}, &time.error);
    if (!time.error.empty()) return time;
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < group_.size(); ++rank) threads.emplace_back([this, rank] { RunRank(rank); });
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors_) {
      if (time.error.empty()) time.error = error;
    }
    std::sort(runs_.begin(), runs_.end());
    time.calls = calls_;
    time.least = runs_.front() / calls_;
    time.median = runs_[runs_.size() / 2] / calls_;
    return time;
  }

 private:
  void RunRank(size_t rank) {
    std::string& error = errors_[rank];
    Communicator& member = *group_[rank];
    const std::unique_ptr<Stream> stream = Stream::Cuda(ordinals_[rank], &error);
    std::optional<Rank> own;
    std::unique_ptr<StreamEvent> begin, end;
    if (stream != nullptr) {
      own.emplace(member, *stream, call_);
      begin = StreamEvent::Create(*stream, /*timed=*/true);
      end = StreamEvent::Create(*stream, /*timed=*/true);
      if (!*own || begin == nullptr || end == nullptr) error = StrCat("rank ", rank, ": the GPU has no memory left");
    }
    // The others are not to wait for one who cannot come.
    const auto failed = [&] {
      if (!error.empty()) member.Abort(error);
      return !error.empty();
    };
    if (!failed()) own->FillWithOnes();
    // lead: the same goes before, so that what hosts do to launch the first op is not in it.
    const auto timed = [&](const std::function<bool()>& issue, bool lead = false) {
      meeting_.arrive_and_wait();
      if (!failed()) {
        if (lead && !issue()) error = member.error();
        begin->Record(*stream);
        if (!issue()) error = member.error();
        end->Record(*stream);
        end->Wait();
        seconds_[rank] = std::chrono::duration<double>(end->Since(*begin)).count();
      }
      meeting_.arrive_and_wait();
    };
    const auto once = [&] { return own->Issue(); };
    timed(once);  // loads the kernel
    if (!failed()) error = own->CheckSum();
    timed(once);
    if (rank == 0)
      calls_ = std::clamp(static_cast<int>(effort_.run_seconds / std::max(Last(), 1e-7)), 3, effort_.most_calls);
    meeting_.arrive_and_wait();
    std::unique_ptr<StepGraph> graph;
    if (!failed()) {
      const auto all = [&] {
        bool issued = true;
        for (int call = 0; call < calls_ && issued; ++call) issued = own->Issue();
        return issued;
      };
      graph = StepGraph::Capture(*stream, all, &error);
      if (graph == nullptr && error.empty()) error = member.error();
    }
    for (int run = 0; run <= effort_.runs; ++run) {
      timed([&] { return graph->Launch(*stream), member.error().empty(); }, /*lead=*/true);
      if (rank == 0 && run > 0) runs_.push_back(Last());
    }
    if (stream != nullptr && error.empty()) error = stream->Synchronize();
    if (error.empty()) error = member.error();
    meeting_.arrive_and_wait();  // nobody's memory goes while another's kernel may read it
  }

  // Of the run that all have timed: the rank that began last waited for nobody to begin.
  double Last() const { return *std::min_element(seconds_.begin(), seconds_.end()); }

  const Call call_;
  const Effort effort_;
  std::vector<int> ordinals_;
  std::vector<std::unique_ptr<Communicator>> group_;
  std::barrier<> meeting_;
  std::vector<double> seconds_;  // [ranks]: each rank its own between two meetings, read by rank 0 behind the second
  std::vector<std::string> errors_;  // [ranks], each rank its own
  int calls_ = 1;                    // written by rank 0 between two meetings
  std::vector<double> runs_;         // rank 0's
};

Case CaseOf(const std::string& model, const Call& call) {
  Case c;
  c.part = "all_reduce";
  c.name = StrCat("AllReduceSum", call.norm ? " + AddRmsNorm" : "", " ", model, ", ", call.tokens, " tokens, ",
                  call.ranks, " ranks on ", call.apart ? call.ranks : 1, call.apart ? " GPUs" : " GPU");
  c.sizes = {{"tokens", call.tokens},
             {"hidden", call.hidden},
             {"ranks", call.ranks},
             {"gpus", call.apart ? call.ranks : 1},
             {"message", static_cast<int64_t>(call.message_bytes())}};
  c.bytes = BytesMoved(call);
  c.measure = [call](const Effort& effort) {
    Call measured = call;
    if (effort.small) measured.hidden = std::min<int64_t>(512, call.hidden);
    return RankTimer(measured, effort).Measure();
  };
  return c;
}

}  // namespace

std::vector<Case> AllReduceCases(int gpus) {
  struct {
    const char* model;
    std::vector<int64_t> tokens;
  } messages[] = {{"8b", {1}}, {"70b", {1, 8, 16, 64, 256}}, {"405b", {1}}};
  std::vector<Case> cases;
  for (const bool apart : {false, true}) {
    for (const int ranks : {2, 4, 8}) {
      if (apart && gpus < ranks) continue;
      for (const auto& [model, tokens] : messages) {
        for (const int64_t n : tokens) {
          Call call = {.ranks = ranks,
                       .apart = apart,
                       .tokens = n,
                       .hidden = PublishedModelConfig(model).value().hidden,
                       .norm = false};
          cases.push_back(CaseOf(model, call));
          call.norm = true;
          // Larger ones are two ops.
          if (ChooseAllReduce(ranks, call.message_bytes(), false) == AllReduceWay::kOneShot) {
            cases.push_back(CaseOf(model, call));
          }
        }
      }
    }
  }
  return cases;
}

}  // namespace altiplano::gpu

// Ranks with a GPU each. Small messages go by our own kernels through memory that the ranks lend each other, large ones
// through NCCL where there is one; all_reduce_plan.h has the table. Tensors on the CPU go as in MakeInProcessGroup.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string_view>
#include <utility>

#include "kernels/comm/all_reduce_plan.h"
#include "kernels/comm/communicator.h"
#include "kernels/comm/die.h"
#include "kernels/comm/message_parts.h"
#include "kernels/comm/nccl_rank.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/peers.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano {

namespace {

using cuda::Peers;
using cuda::PeerSignals;
using cuda::PeerVerdicts;

size_t BytesOf(const TensorView& x) {
  return static_cast<size_t>(x.elements()) * SizeOf(x.dtype);
}

// What the ranks share.
class GpuGroup {
 public:
  GpuGroup(const CudaGroupOptions& options)
      : options_(options), host_(MakeInProcessGroup(static_cast<int>(options.ordinals.size()), options.patience)) {}
  ~GpuGroup() {
    for (const auto& rank : nccl_) rank->Abort();
    for (const auto& rank : nccl_) rank->End();
    nccl_.clear();
    for (int ordinal : std::set<int>(options_.ordinals.begin(), options_.ordinals.end())) {
      if (verdicts_ != nullptr) cuda::SynchronizeGpu(ordinal);  // nobody reads what is freed now
    }
    if (verdicts_ != nullptr) cuda::FreeShared(verdicts_);
  }

  // Empty, or why it cannot be.
  std::string Form() {
    const std::vector<int>& ordinals = options_.ordinals;
    if (ordinals.size() > static_cast<size_t>(kMostPeers)) {
      return std::to_string(ordinals.size()) + " ranks, at most " + std::to_string(kMostPeers) + " on GPUs";
    }
    if (std::string error = cuda::EnablePeerAccess(ordinals); !error.empty()) return error;
    verdicts_ = static_cast<PeerVerdicts*>(cuda::AllocateShared(sizeof(PeerVerdicts)));
    if (verdicts_ == nullptr) return "no host memory that GPUs reach";
    peers_.patience_ns =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(options_.patience).count());
    peers_.verdicts = verdicts_;
    peers_.ranks = static_cast<int>(ordinals.size());
    const PeerSignals start = {};
    for (size_t rank = 0; rank < ordinals.size(); ++rank) {
      std::string error;
      const auto stream = Stream::Cuda(ordinals[rank], &error);
      if (stream == nullptr) return error;
      signals_.push_back(Buffer::Allocate(*stream, sizeof(PeerSignals)));
      mailboxes_.push_back(Buffer::Allocate(*stream, kMailboxBytes));
      if (!signals_.back() || !mailboxes_.back()) {
        return "no memory on GPU " + std::to_string(ordinals[rank]) + " for " + std::to_string(kMailboxBytes >> 20) +
               " MiB that the ranks lend each other";
      }
      Copy(*stream, signals_.back().data(), Device::kCuda, &start, Device::kCpu, sizeof(start));
      if (error = stream->Synchronize(); !error.empty()) return error;
      peers_.signals[rank] = static_cast<PeerSignals*>(signals_.back().data());
      peers_.mailbox[rank] = static_cast<char*>(mailboxes_.back().data());
    }
    // NCCL takes one rank to a GPU.
    const std::set<int> distinct(ordinals.begin(), ordinals.end());
    peers_.alone = distinct.size() == ordinals.size();
    if (options_.nccl == nullptr || !peers_.alone) return "";
    // Steps with graphs and steps without take turns on a stream, which is the mixture that it says no to.
    const char* mixing = std::getenv("NCCL_GRAPH_MIXING_SUPPORT");
    if (options_.capture_nccl && mixing != nullptr && std::string_view(mixing) == "0") {
      return "NCCL_GRAPH_MIXING_SUPPORT=0 rules graphs with NCCL's calls out";
    }
    return FormNccl(*options_.nccl);
  }

  int size() const { return peers_.ranks; }
  Communicator& host(int rank) { return *host_[static_cast<size_t>(rank)]; }
  Peers peers(int rank) const {
    Peers peers = peers_;
    peers.rank = rank;
    return peers;
  }
  bool has_nccl() const { return !nccl_.empty(); }
  AllReduceWay ChooseWay(size_t bytes, bool nccl) const {
    if (nccl && bytes > options_.most_own_bytes) return AllReduceWay::kNccl;
    return ChooseAllReduce(size(), bytes, nccl);
  }
  size_t most_captured_bytes() const {
    if (options_.capture_nccl || !has_nccl()) return SIZE_MAX;
    return std::min(options_.most_own_bytes, MostBytesWithoutNccl(size(), true));
  }
  std::string AllocateSummed(int rank, size_t bytes, void** memory) {
    *memory = nullptr;
    if (!has_nccl() || ChooseWay(bytes, true) != AllReduceWay::kNccl) return "";
    return nccl_[static_cast<size_t>(rank)]->Allocate(bytes, memory);
  }
  std::string NcclAllReduce(int rank, Stream& stream, const TensorView& x) {
    return nccl_[static_cast<size_t>(rank)]->AllReduce(stream, x, options_.patience);
  }

  void Abort(std::string_view reason) {
    host_[0]->Abort(reason);
    std::atomic_ref(verdicts_->aborted).store(1);
    for (const auto& rank : nccl_) rank->Abort();
  }

  // The first reason, found by a kernel, NCCL or the host. Whoever reads it makes the group end for all.
  std::string error() {
    std::string error = host_[0]->error();
    if (!error.empty()) return error;
    for (uint32_t& written : verdicts_->rank) {
      const uint32_t verdict = std::atomic_ref(written).load();
      if (verdict < cuda::kGaveUpOn || !error.empty()) continue;
      error = "no word for " + std::to_string(options_.patience.count()) + " ms from rank " +
              std::to_string(verdict - cuda::kGaveUpOn);
    }
    for (size_t rank = 0; error.empty() && rank < nccl_.size(); ++rank) {
      bool under_way = false;
      error = nccl_[rank]->Error(&under_way);
      if (!error.empty()) error = "rank " + std::to_string(rank) + ": " + error;
    }
    if (!error.empty()) Abort(error);
    return host_[0]->error();
  }

 private:
  std::string FormNccl(const NcclApi& api) {
    NcclUniqueId id;
    if (const NcclResult result = api.get_unique_id(&id); result != kNcclSuccess) {
      return std::string("NCCL: ") + api.error_string(result);
    }
    std::vector<NcclRank::Place> places;
    for (const int gpu : options_.ordinals) {
      places.push_back({.gpu = gpu, .id = id, .rank = static_cast<int>(places.size()), .ranks = size()});
    }
    return NcclRank::Form(api, places, options_.patience, &nccl_);
  }

  const CudaGroupOptions options_;
  const std::vector<std::unique_ptr<Communicator>> host_;
  std::vector<Buffer> signals_, mailboxes_;  // [ranks]
  PeerVerdicts* verdicts_ = nullptr;
  Peers peers_ = {};
  std::vector<std::unique_ptr<NcclRank>> nccl_;  // [ranks], or none
};

class CudaRank : public Communicator {
 public:
  CudaRank(std::shared_ptr<GpuGroup> group, int rank) : group_(std::move(group)), peers_(group_->peers(rank)) {}
  ~CudaRank() override { group_->Abort("a rank has left"); }

  int rank() const override { return peers_.rank; }
  int size() const override { return peers_.ranks; }
  void Abort(std::string_view reason) override { group_->Abort(reason); }
  std::string error() const override { return group_->error(); }

  // Our own kernels count their calls in device memory. NCCL's are captured where somebody wants it.
  size_t most_captured_bytes() const override { return group_->most_captured_bytes(); }

  bool AllocateSummed(const Stream& stream, size_t bytes, void** memory) override {
    *memory = nullptr;
    if (stream.device() == Device::kCpu) return true;
    const std::string error = group_->AllocateSummed(rank(), bytes, memory);
    if (!error.empty()) {
      Abort("rank " + std::to_string(rank()) + ": " + std::to_string(bytes) + " bytes that NCCL sums: " + error);
    }
    return error.empty();
  }

  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    if (stream.device() == Device::kCpu) return group_->host(rank()).AllReduceSum(stream, x);
    if (x.device != Device::kCuda || x.rank < 1 || x.rank > 2 || (x.dtype != DType::kF32 && x.dtype != DType::kBF16)) {
      Die("AllReduceSum: wants an f32 or bf16 vector or matrix on the GPU");
    }
    if (x.elements() == 0 || size() == 1) return alive();
    const bool nccl = group_->has_nccl() && x.contiguous();
    switch (group_->ChooseWay(BytesOf(x), nccl)) {
      case AllReduceWay::kNccl: {
        const std::string error = group_->NcclAllReduce(rank(), stream, x);
        if (!error.empty()) Abort("rank " + std::to_string(rank()) + ": " + error);
        break;
      }
      case AllReduceWay::kOneShot:
        cuda::AllReduceOneShot(stream, peers_, x);
        break;
      case AllReduceWay::kTwoShots:
        ForParts(x, [&](const TensorView& part, int64_t) { cuda::AllReduceTwoShots(stream, peers_, part); });
        break;
    }
    return alive();
  }

  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    if (stream.device() == Device::kCpu || size() == 1 || args.x.elements() == 0 || args.x.dim(1) > cuda::kWidestNorm ||
        group_->ChooseWay(BytesOf(args.x), group_->has_nccl()) != AllReduceWay::kOneShot) {
      return Communicator::AllReduceAddRmsNorm(stream, args);
    }
    cuda::AllReduceAddRmsNorm(stream, peers_, args);
    return alive();
  }

  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    if (x.device == Device::kCpu) return group_->host(rank()).AllGather(stream, out, x);
    if (x.rank != 2 || (!out.empty() && (out.device != Device::kCuda || out.rank != 2 || out.dtype != x.dtype ||
                                         out.dim(0) != x.dim(0) || out.dim(1) != x.dim(1) * size()))) {
      Die("AllGather: wants matrices of the same dtype, rows and part of the columns on the GPU");
    }
    if (static_cast<size_t>(x.dim(1)) * SizeOf(x.dtype) > kPeerMessageBytes) {
      Die("AllGather: a row is larger than kPeerMessageBytes");
    }
    ForParts(x, [&](const TensorView& part, int64_t row) {
      TensorView whole;
      if (!out.empty()) {
        whole = out.first(part.dim(0));
        whole.data = out.row<char>(0) + row * out.stride0 * static_cast<int64_t>(SizeOf(out.dtype));
      }
      cuda::PeerGather(stream, peers_, whole, part);
    });
    return alive();
  }

  bool Broadcast(Stream& stream, const TensorView& x) override {
    if (x.device == Device::kCpu) return group_->host(rank()).Broadcast(stream, x);
    if (!x.contiguous()) Die("Broadcast: wants a dense tensor on the GPU");
    if (size() > 1) {
      ForParts(x, [&](const TensorView& part, int64_t) { cuda::PeerBroadcast(stream, peers_, part); });
    }
    return alive();
  }

 private:
  template <typename Call>
  static void ForParts(const TensorView& x, Call&& call) {
    MessageParts parts(x, kPeerMessageBytes);
    TensorView part;
    for (int64_t begin; parts.Next(&part, &begin);) call(part, begin);
  }

  // As far as the host knows without waiting.
  bool alive() const { return group_->host(rank()).error().empty() && !cuda::HasFailed(*peers_.verdicts); }

  const std::shared_ptr<GpuGroup> group_;
  const Peers peers_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeCudaGroup(const CudaGroupOptions& options, std::string* error) {
  if (options.ordinals.empty()) Die("MakeCudaGroup: wants at least one rank");
  std::vector<std::unique_ptr<Communicator>> members;
  auto group = std::make_shared<GpuGroup>(options);
  if (*error = group->Form(); !error->empty()) return members;
  for (int rank = 0; rank < group->size(); ++rank) members.push_back(std::make_unique<CudaRank>(group, rank));
  return members;
}

}  // namespace altiplano

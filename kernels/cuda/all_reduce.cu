// Sums over ranks whose GPUs reach each other's memory, without the host. A rank lays its message out in its own
// mailbox; blocks of the same index meet by flags in each other's memory; then each reads what the peers laid out. The
// order of the sum is the order of ranks, in f32 and rounded once, so that all ranks hold the same bits.
//
// Nobody waits for ever: a block that polls looks now and then at the verdicts of the host and the other ranks, and at
// the time. all_reduce_plan.h says why two halves of a mailbox are enough.
#include <type_traits>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/peers.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rows_plan.h"

namespace altiplano::cuda {

namespace {

constexpr uint32_t kPollsPerLook = 256;

// A message of a rank's: a matrix read as one row after the other. Counts of elements fit 32 bits, whose division is a
// few instructions and not a call.
struct Message {
  Elements x;
  uint32_t columns = 1, elements = 0;

  explicit Message(const TensorView& view)
      : x(view),
        columns(static_cast<uint32_t>(view.dim(view.rank - 1))),
        elements(static_cast<uint32_t>(view.elements())) {}
};
static_assert(kPeerMessageBytes < UINT32_MAX);

// In memory, of the element at `at` of a matrix read so.
PTX_FUNCTION int64_t PlaceOf(int64_t stride, uint32_t columns, int64_t at) {
  const auto element = static_cast<uint32_t>(at);
  return stride == columns ? element : element / columns * stride + element % columns;
}

PTX_FUNCTION Elements MailOf(const Peers& peers, int rank, uint32_t call, Mail mail, bool bf16) {
  Elements at;
  at.data = peers.mailbox[rank] + MailOffset(call, mail);
  at.bf16 = bf16;
  return at;
}

// The number of the call that runs, from 1 on.
PTX_FUNCTION uint32_t CallOf(const Peers& peers) {
  return ptx::LdGlobal(&peers.signals[peers.rank]->calls) + 1;
}

// And lets the kernel after this one ask for its weights while the ranks come together.
PTX_FUNCTION uint32_t BeginCall(const Peers& peers) {
  ptx::WaitForKernelsBefore();
  if (peers.alone) ptx::LetNextKernelStart();
  return CallOf(peers);
}

PTX_FUNCTION bool SomebodyHasFailed(const Peers& peers) {
  if (ptx::LdRelaxedSys(&peers.verdicts->aborted) != 0) return true;
  for (int rank = 0; rank < peers.ranks; ++rank) {
    if (ptx::LdRelaxedSys(&peers.verdicts->rank[rank]) != 0) return true;
  }
  return false;
}

// Until the flag of rank `other` shows the call; otherwise the verdict.
PTX_FUNCTION uint32_t WaitFor(const Peers& peers, const uint32_t* flag, uint32_t call, int other) {
  uint64_t first_look = 0;
  for (uint32_t polls = 1;; ++polls) {
    // A peer may be a call ahead; numbers wrap.
    if (static_cast<int32_t>(ptx::LdAcquireSys(flag) - call) >= 0) return 0;
    if (polls % kPollsPerLook != 0) continue;
    if (SomebodyHasFailed(peers)) return kLeft;
    const uint64_t now = ptx::GlobalTimer();
    if (first_look == 0) first_look = now;
    if (now - first_look > peers.patience_ns) return kGaveUpOn + static_cast<uint32_t>(other);
  }
}

// This block of all ranks: what each stored before is seen by all after. False, in all threads: the group has ended.
PTX_FUNCTION bool Meet(const Peers& peers, int meeting, uint32_t call) {
  PTX_SHARED(uint32_t, failures, 2);
  if (threadIdx.x == 0) ptx::StShared(&failures[meeting], 0u);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < peers.ranks) {
    const int other = static_cast<int>(threadIdx.x);
    PeerSignals* own = peers.signals[peers.rank];
    uint32_t verdict = ptx::LdRelaxedSys(&own->broken);
    if (verdict == 0) {
      ptx::StReleaseSys(&peers.signals[other]->arrived[meeting][blockIdx.x][peers.rank], call);
      verdict = WaitFor(peers, &own->arrived[meeting][blockIdx.x][other], call, other);
      if (verdict != 0) {
        // The first to give up says on whom; who leaves does not take its word back.
        if (verdict != kLeft || ptx::LdRelaxedSys(&peers.verdicts->rank[peers.rank]) == 0) {
          ptx::StRelaxedSys(&peers.verdicts->rank[peers.rank], verdict);
        }
        ptx::StRelaxedSys(&own->broken, 1u);
      }
    }
    if (verdict != 0) ptx::AddShared(&failures[meeting], 1u);
  }
  __syncthreads();
  return ptx::LdShared(&failures[meeting]) == 0;
}

// The last block to end counts the call.
PTX_FUNCTION void EndCall(const Peers& peers, uint32_t call) {
  if (threadIdx.x != 0) return;
  PeerSignals* own = peers.signals[peers.rank];
  if (ptx::AddGlobal(&own->blocks_ended, 1u) != gridDim.x - 1) return;
  ptx::StGlobal(&own->blocks_ended, 0u);
  ptx::StGlobal(&own->calls, call);
}

// What a thread has on its way at once, since each load that waits for the one before costs the time of flight again: a
// microsecond over NVLink. Packs of its own that lie a block's threads apart, and of each those of up to kMost ranks.
constexpr int PacksOfRanks(int most) {
  return most > 4 ? 2 : 4;
}

// Packs of up to kMost ranks.
template <int kPack, int kMost>
struct RanksPacks {
  static constexpr int kPacks = PacksOfRanks(kMost);
  uint32_t raw[kPacks][kMost][kPack] = {};

  // Of each rank, from its mailbox, the packs first, first + stride ... before `end`.
  PTX_FUNCTION void Load(const Peers& peers, uint32_t call, bool bf16, int64_t first, int stride, int64_t end) {
    // One branch for all loads, and none between them.
    bf16 ? LoadAs<true>(peers, call, first, stride, end) : LoadAs<false>(peers, call, first, stride, end);
  }
  template <bool bf16>
  PTX_FUNCTION void LoadAs(const Peers& peers, uint32_t call, int64_t first, int stride, int64_t end) {
    PTX_UNROLL
    for (int n = 0; n < kPacks; ++n) {
      const int64_t pack = first + n * stride;
      PTX_UNROLL
      for (int rank = 0; rank < kMost; ++rank) {
        if (pack >= end || rank >= peers.ranks) continue;
        LoadRaw(MailOf(peers, rank, call, Mail::kMessage, bf16), pack * kPack, raw[n][rank]);
      }
    }
  }
  // Of the n-th, rank 0 first.
  PTX_FUNCTION void Sum(const Peers& peers, bool bf16, int n, float (&sum)[kPack]) const {
    Widen(raw[n][0], bf16, sum);
    PTX_UNROLL
    for (int rank = 1; rank < kMost; ++rank) {
      if (rank >= peers.ranks) break;
      float x[kPack];
      Widen(raw[n][rank], bf16, x);
      PTX_UNROLL
      for (int i = 0; i < kPack; ++i) sum[i] = ptx::Add(sum[i], x[i]);
    }
  }
};

template <int kPack>
PTX_FUNCTION void LayOut(const Peers& peers, uint32_t call, const Message& message, PackRange packs) {
  constexpr int kPacks = 4;
  const Elements mail = MailOf(peers, peers.rank, call, Mail::kMessage, message.x.bf16);
  const int stride = static_cast<int>(blockDim.x);
  for (int64_t first = packs.begin + threadIdx.x; first < packs.end; first += kPacks * stride) {
    uint32_t raw[kPacks][kPack] = {};
    PTX_UNROLL
    for (int n = 0; n < kPacks; ++n) {
      const int64_t pack = first + n * stride;
      if (pack < packs.end) LoadRaw(message.x, PlaceOf(message.x.stride, message.columns, pack * kPack), raw[n]);
    }
    PTX_UNROLL
    for (int n = 0; n < kPacks; ++n) {
      const int64_t pack = first + n * stride;
      if (pack >= packs.end) break;
      float x[kPack];
      Widen(raw[n], message.x.bf16, x);
      Store(mail, pack * kPack, x);
    }
  }
}

// The sums of all ranks' packs of a range go to `put`.
template <int kPack, int kMost, typename Put>
PTX_FUNCTION void SumPacks(const Peers& peers, uint32_t call, bool bf16, PackRange packs, const Put& put) {
  const int stride = static_cast<int>(blockDim.x);
  for (int64_t first = packs.begin + threadIdx.x; first < packs.end; first += PacksOfRanks(kMost) * stride) {
    RanksPacks<kPack, kMost> of_ranks;
    of_ranks.Load(peers, call, bf16, first, stride, packs.end);
    PTX_UNROLL
    for (int n = 0; n < PacksOfRanks(kMost); ++n) {
      const int64_t pack = first + n * stride;
      if (pack >= packs.end) break;
      float sum[kPack];
      of_ranks.Sum(peers, bf16, n, sum);
      put(pack, sum);
    }
  }
}

template <int kPack, int kMost>
__global__ void __launch_bounds__(kMostPeerThreads, 1) OneShotKernel(Peers peers, Message message) {
  const uint32_t call = BeginCall(peers);
  const PackRange own = BlockPacks(message.elements / kPack, gridDim.x, blockIdx.x);
  LayOut<kPack>(peers, call, message, own);
  if (!Meet(peers, 0, call)) return;
  SumPacks<kPack, kMost>(peers, call, message.x.bf16, own, [&](int64_t pack, const float(&sum)[kPack]) {
    Store(message.x, PlaceOf(message.x.stride, message.columns, pack * kPack), sum);
  });
  EndCall(peers, call);
}

template <int kPack, int kMost>
__global__ void __launch_bounds__(kMostPeerThreads, 1) TwoShotsKernel(Peers peers, Message message) {
  const uint32_t call = BeginCall(peers);
  const bool bf16 = message.x.bf16;
  const PackRange own = BlockPacks(message.elements / kPack, gridDim.x, blockIdx.x);
  LayOut<kPack>(peers, call, message, own);
  if (!Meet(peers, 0, call)) return;
  const Elements sums = MailOf(peers, peers.rank, call, Mail::kSums, bf16);
  SumPacks<kPack, kMost>(peers, call, bf16, RankPacks(own, peers.ranks, peers.rank),
                         [&](int64_t pack, const float(&sum)[kPack]) { Store(sums, pack * kPack, sum); });
  if (!Meet(peers, 1, call)) return;
  // Of all shares at once, the first of which is the longest.
  const PackRange longest = RankPacks(own, peers.ranks, 0);
  for (int64_t at = threadIdx.x; at < longest.end - longest.begin; at += blockDim.x) {
    uint32_t raw[kMost][kPack] = {};
    PTX_UNROLL
    for (int rank = 0; rank < kMost; ++rank) {
      const PackRange share = RankPacks(own, peers.ranks, rank);
      if (rank >= peers.ranks || at >= share.end - share.begin) break;
      LoadRaw(MailOf(peers, rank, call, Mail::kSums, bf16), (share.begin + at) * kPack, raw[rank]);
    }
    PTX_UNROLL
    for (int rank = 0; rank < kMost; ++rank) {
      const PackRange share = RankPacks(own, peers.ranks, rank);
      if (rank >= peers.ranks || at >= share.end - share.begin) break;
      float sum[kPack];
      Widen(raw[rank], bf16, sum);
      Store(message.x, PlaceOf(message.x.stride, message.columns, (share.begin + at) * kPack), sum);
    }
  }
  EndCall(peers, call);
}

// A block takes every gridDim.x-th row, with as many threads as AddRmsNorm has, so that sums of squares have its order.
template <int kPack, int kMost>
__global__ void __launch_bounds__(kMostNormThreads, 1)
    AllReduceAddRmsNormKernel(Peers peers, Elements out, Elements residual, Message message, Elements weight, float eps,
                              int rows) {
  constexpr int kPacks = PacksOfRanks(kMost);
  const uint32_t call = BeginCall(peers);
  const int width = static_cast<int>(message.columns), packs = width / kPack, stride = static_cast<int>(blockDim.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    LayOut<kPack>(peers, call, message, {row * packs, (row + 1) * packs});
  }
  if (!Meet(peers, 0, call)) return;
  auto* waiting_row = static_cast<Waiting<kPack>*>(ptx::DynamicShared());
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float squares = 0;
    for (int first = static_cast<int>(threadIdx.x); first < packs; first += kPacks * stride) {
      uint32_t before[kPacks][kPack] = {};
      PTX_UNROLL
      for (int n = 0; n < kPacks; ++n) {
        const int pack = first + n * stride;
        if (pack < packs) LoadRaw(residual, row * residual.stride + pack * kPack, before[n]);
      }
      RanksPacks<kPack, kMost> of_ranks;
      of_ranks.Load(peers, call, message.x.bf16, row * packs + first, stride, (row + 1) * packs);
      PTX_UNROLL
      for (int n = 0; n < kPacks; ++n) {
        const int pack = first + n * stride;
        if (pack >= packs) break;
        Waiting<kPack> waiting;
        float sum[kPack];
        of_ranks.Sum(peers, message.x.bf16, n, waiting.x);
        Widen(before[n], residual.bf16, sum);
        PTX_UNROLL
        for (int i = 0; i < kPack; ++i) {
          waiting.x[i] = Rounded(sum[i] + Rounded(waiting.x[i], message.x.bf16), residual.bf16);
        }
        Store(residual, row * residual.stride + pack * kPack, waiting.x);
        PTX_UNROLL
        for (int i = 0; i < kPack; ++i) squares += waiting.x[i] * waiting.x[i];
        ptx::StShared(&waiting_row[pack], waiting);
      }
    }
    ScaleRow(RowOf(out, row), weight, waiting_row, squares, eps, width);
    __syncthreads();  // before the next row's sums take the place of this one's
  }
  EndCall(peers, call);
}

// Rows of Words, from the mailbox of rank `from` (-1: of all, side by side) to `out`.
template <typename Word>
__global__ void __launch_bounds__(kMostPeerThreads, 1)
    GatherKernel(Peers peers, Word* out, int64_t out_stride, const Word* x, int64_t x_stride, uint32_t rows,
                 uint32_t words, int from) {
  const uint32_t call = BeginCall(peers);
  const PackRange own = BlockPacks(int64_t{rows} * words, gridDim.x, blockIdx.x);
  if (from < 0 || from == peers.rank) {
    constexpr int kWords = 4;
    auto* mail = reinterpret_cast<Word*>(peers.mailbox[peers.rank] + MailOffset(call, Mail::kMessage));
    const int stride = static_cast<int>(blockDim.x);
    for (int64_t first = own.begin + threadIdx.x; first < own.end; first += kWords * stride) {
      Word loaded[kWords] = {};
      PTX_UNROLL
      for (int n = 0; n < kWords; ++n) {
        const int64_t word = first + n * stride;
        if (word < own.end) loaded[n] = ptx::LdGlobal(x + PlaceOf(x_stride, words, word));
      }
      PTX_UNROLL
      for (int n = 0; n < kWords; ++n) {
        const int64_t word = first + n * stride;
        if (word < own.end) ptx::StGlobal(mail + word, loaded[n]);
      }
    }
  }
  if (!Meet(peers, 0, call)) return;
  for (int64_t word = own.begin + threadIdx.x; out != nullptr && word < own.end; word += blockDim.x) {
    const auto wanted = [&](int rank) { return from < 0 ? rank < peers.ranks : rank == from; };
    Word loaded[kMostPeers] = {};
    PTX_UNROLL
    for (int rank = 0; rank < kMostPeers; ++rank) {
      if (!wanted(rank)) continue;
      const char* mailbox = peers.mailbox[rank] + MailOffset(call, Mail::kMessage);
      loaded[rank] = ptx::LdGlobal(reinterpret_cast<const Word*>(mailbox) + word);
    }
    Word* const to = out + PlaceOf(out_stride, words, word);
    PTX_UNROLL
    for (int rank = 0; rank < kMostPeers; ++rank) {
      if (wanted(rank)) ptx::StGlobal(to + (from < 0 ? rank * words : 0), loaded[rank]);
    }
  }
  EndCall(peers, call);
}

template <typename Word>
void Gather(Stream& stream, const Peers& peers, const char* name, const TensorView& out, const TensorView& x,
            int from) {
  const auto per_word = static_cast<int64_t>(sizeof(Word) / SizeOf(x.dtype));
  const int64_t rows = x.rank == 2 ? x.dim(0) : 1, words = x.rank == 2 ? x.dim(1) / per_word : x.elements() / per_word;
  const PeerLaunchShape plan = PlanPeerLaunch(rows * words);
  LaunchWithPeers(stream, peers, name, {.grid_x = plan.blocks, .threads = plan.threads}, GatherKernel<Word>,
                  static_cast<Word*>(out.data), out.rank == 2 ? out.stride0 / per_word : 0,
                  static_cast<const Word*>(x.data), x.rank == 2 ? x.stride0 / per_word : 0, rows, words, from);
}

template <typename Word>
bool FitsWords(const TensorView& view) {
  const size_t element = SizeOf(view.dtype);
  if (sizeof(Word) % element != 0) return false;
  const auto per_word = static_cast<int64_t>(sizeof(Word) / element);
  return view.empty() || (reinterpret_cast<uintptr_t>(view.data) % sizeof(Word) == 0 &&
                          (view.rank == 2 ? view.dim(1) : view.elements()) % per_word == 0 &&
                          (view.rank != 2 || view.stride0 % per_word == 0));
}

void GatherWords(Stream& stream, const Peers& peers, const char* name, const TensorView& out, const TensorView& x,
                 int from) {
  if (FitsWords<uint4>(out) && FitsWords<uint4>(x)) return Gather<uint4>(stream, peers, name, out, x, from);
  if (FitsWords<uint2>(out) && FitsWords<uint2>(x)) return Gather<uint2>(stream, peers, name, out, x, from);
  if (FitsWords<uint32_t>(out) && FitsWords<uint32_t>(x)) return Gather<uint32_t>(stream, peers, name, out, x, from);
  Gather<uint16_t>(stream, peers, name, out, x, from);
}

// The kernel for at least as many ranks as there are.
template <typename KernelFor>
auto ForRanks(const Peers& peers, KernelFor&& kernel_for) {
  return peers.ranks <= 2   ? kernel_for(std::integral_constant<int, 2>())
         : peers.ranks <= 4 ? kernel_for(std::integral_constant<int, 4>())
                            : kernel_for(std::integral_constant<int, kMostPeers>());
}

template <typename Kernel>
void LaunchSum(Stream& stream, const Peers& peers, const char* name, const TensorView& x, Kernel packed, Kernel plain) {
  const bool by_packs = IsPacked(x, kRowPack);
  const PeerLaunchShape plan = PlanPeerLaunch(x.elements() / (by_packs ? kRowPack : 1));
  LaunchWithPeers(stream, peers, name, {.grid_x = plan.blocks, .threads = plan.threads}, by_packs ? packed : plain,
                  Message(x));
}

}  // namespace

void AllReduceOneShot(Stream& stream, const Peers& peers, const TensorView& x) {
  const auto packed = ForRanks(peers, [](auto most) { return &OneShotKernel<kRowPack, decltype(most)::value>; });
  LaunchSum(stream, peers, "AllReduceOneShot", x, packed, &OneShotKernel<1, kMostPeers>);
}

void AllReduceTwoShots(Stream& stream, const Peers& peers, const TensorView& x) {
  const auto packed = ForRanks(peers, [](auto most) { return &TwoShotsKernel<kRowPack, decltype(most)::value>; });
  LaunchSum(stream, peers, "AllReduceTwoShots", x, packed, &TwoShotsKernel<1, kMostPeers>);
}

void AllReduceAddRmsNorm(Stream& stream, const Peers& peers, const AddRmsNormArgs& args) {
  const int64_t rows = args.x.dim(0), width = args.x.dim(1);
  const bool by_packs = IsPacked(args.out, kRowPack) && IsPacked(args.x, kRowPack) && IsPacked(args.weight, kRowPack) &&
                        IsPacked(args.residual, kRowPack);
  LaunchShape shape = NormPlan(rows, width, by_packs ? kRowPack : 1);
  shape.grid_x = std::min(shape.grid_x, kMostPeerBlocks);
  const auto packed =
      ForRanks(peers, [](auto most) { return &AllReduceAddRmsNormKernel<kRowPack, decltype(most)::value>; });
  LaunchWithPeers(stream, peers, "AllReduceAddRmsNorm", shape,
                  by_packs ? packed : &AllReduceAddRmsNormKernel<1, kMostPeers>, Elements(args.out),
                  Elements(args.residual), Message(args.x), Elements(args.weight), args.eps, static_cast<int>(rows));
}

void PeerGather(Stream& stream, const Peers& peers, const TensorView& out, const TensorView& x) {
  GatherWords(stream, peers, "PeerGather", out, x, -1);
}

void PeerBroadcast(Stream& stream, const Peers& peers, const TensorView& x) {
  GatherWords(stream, peers, "PeerBroadcast", x, x, 0);
}

}  // namespace altiplano::cuda

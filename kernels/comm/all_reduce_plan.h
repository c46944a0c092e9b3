// How ranks that reach each other's memory sum a message: which way, with how many blocks, in which memory. Pure.
//
// One shot: each rank lays its message out, all meet, each reads everybody's and sums. (N - 1) messages come to a rank.
// Two shots: all meet, each sums its share of the message, all meet again, each reads the sums of the others' shares.
// 2 (N - 1) / N messages come to a rank, in twice the time of flight.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace altiplano {

inline constexpr int kMostPeers = 8;
// Of a launch. All blocks of all ranks wait for each other, and eight ranks of tests may share one GPU of 132
// multiprocessors.
inline constexpr uint32_t kMostPeerBlocks = 16;
inline constexpr uint32_t kMostPeerThreads = 512;
// A message that is laid out for the peers; larger ones go in pieces.
inline constexpr size_t kPeerMessageBytes = size_t{8} << 20;

enum class AllReduceWay { kOneShot, kTwoShots, kNccl };

// Where the ways cross. Reasoned from published times of others' kernels on 8 H100 (one shot 17 us at 256 KiB, two 15
// and NCCL 24 at 512 KiB; NCCL 121 and two 125 at 16 MiB); no GPU has run ours.
struct AllReduceRow {
  int most_ranks;
  size_t one_shot_bytes;   // up to
  size_t two_shots_bytes;  // up to; NCCL beyond, or two shots in pieces where there is none
};
inline constexpr AllReduceRow kAllReduceTable[] = {
    {2, kPeerMessageBytes, kPeerMessageBytes},  // two shots would move the same bytes, later
    {4, size_t{512} << 10, kPeerMessageBytes},
    {kMostPeers, size_t{256} << 10, kPeerMessageBytes},
};

// Null: more ranks than peers.
constexpr const AllReduceRow* FindAllReduceRow(int ranks) {
  for (const AllReduceRow& row : kAllReduceTable) {
    if (ranks <= row.most_ranks) return &row;
  }
  return nullptr;
}

constexpr AllReduceWay ChooseAllReduce(int ranks, size_t bytes, bool have_nccl) {
  const AllReduceRow* row = FindAllReduceRow(ranks);
  if (row == nullptr) return AllReduceWay::kNccl;
  if (bytes <= row->one_shot_bytes) return AllReduceWay::kOneShot;
  return bytes <= row->two_shots_bytes || !have_nccl ? AllReduceWay::kTwoShots : AllReduceWay::kNccl;
}

// Up to which no message goes to NCCL.
constexpr size_t MostBytesWithoutNccl(int ranks, bool have_nccl) {
  const AllReduceRow* row = FindAllReduceRow(ranks);
  if (row == nullptr) return 0;
  return have_nccl ? row->two_shots_bytes : SIZE_MAX;
}

// ---- the memory that a rank lends its peers: two halves, each the message and the sums of the rank's share
//
// Calls take the halves in turn. Whoever lays out call n has met everybody in call n - 1, and they had all ended call
// n - 2 then, so that nobody still reads the half that call n writes.
constexpr uint32_t HalfOfCall(uint32_t call) {
  return call & 1;
}
enum class Mail { kMessage, kSums };
constexpr size_t MailOffset(uint32_t call, Mail mail) {
  return (2 * HalfOfCall(call) + (mail == Mail::kSums ? 1 : 0)) * kPeerMessageBytes;
}
inline constexpr size_t kMailboxBytes = 4 * kPeerMessageBytes;

// ---- who works on what: packs [begin, end) of a message
struct PackRange {
  int64_t begin, end;
};
// A block's, and a block's only: blocks of the same index meet, and do not wait for the others.
constexpr PackRange BlockPacks(int64_t packs, uint32_t blocks, uint32_t block) {
  const int64_t each = (packs + blocks - 1) / blocks;
  return {std::min(packs, each * block), std::min(packs, each * (block + 1))};
}
// A rank's share of a block's packs.
constexpr PackRange RankPacks(PackRange block, int ranks, int rank) {
  const int64_t each = (block.end - block.begin + ranks - 1) / ranks;
  return {std::min(block.end, block.begin + each * rank), std::min(block.end, block.begin + each * (rank + 1))};
}

struct PeerLaunchShape {
  uint32_t blocks, threads;
  bool operator==(const PeerLaunchShape&) const = default;
};
constexpr PeerLaunchShape PlanPeerLaunch(int64_t packs) {
  const auto blocks =
      static_cast<uint32_t>(std::clamp<int64_t>((packs + kMostPeerThreads - 1) / kMostPeerThreads, 1, kMostPeerBlocks));
  const int64_t each = (packs + blocks - 1) / blocks;
  return {blocks, static_cast<uint32_t>(std::clamp<int64_t>((each + 31) / 32 * 32, 32, kMostPeerThreads))};
}

}  // namespace altiplano

// The scheduler's state as a frame of a flight record: what FlightCheckpoint says, in its order. Linear in the state.
#include <algorithm>
#include <bit>
#include <concepts>
#include <cstring>

#include "server/scheduler/flight_frame_writer.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

namespace {

uint8_t* PutSigned(int64_t value, uint8_t* at) {
  return PutNumber(ZigZag(value), at);
}

// Neighbours in a table were often taken one after the other.
uint8_t* PutBlocks(std::span<const BlockId> blocks, uint8_t* at) {
  at = PutNumber(blocks.size(), at);
  BlockId last = 0;
  for (BlockId block : blocks) {
    at = PutSigned(block - last, at);
    last = block;
  }
  return at;
}

constexpr size_t kMostBlockBytes = 5;
constexpr size_t kMostNameBytes = 16;       // in a list of names
constexpr size_t kMostSequenceBytes = 160;  // without blocks and names

// Of what WriteRequest writes.
size_t MostBytes(const LiveRequest& request) {
  constexpr size_t kRequest = 160;
  size_t bytes = kRequest + request.arrival.size() + kMostBlockBytes * request.shared.size() +
                 kMostNameBytes * request.prompt_hashes.size();
  for (const Sequence& sequence : request.sequences) {
    bytes += kMostSequenceBytes + kMostBlockBytes * sequence.blocks.size() + kMostNameBytes * sequence.hashes.size();
  }
  return bytes;
}

// Of what WriteSaidRequest writes.
size_t MostSaidBytes(const LiveRequest& request) {
  const Sequence& sequence = request.sequences.front();
  return kMostSequenceBytes + kMostBlockBytes * sequence.blocks.size() + kMostNameBytes * sequence.hashes.size();
}

void PutLearner(const StepCostLearner& learner, FlightFrameWriter* out) {
  StepCostLearner::VisitNumbers(learner, [out](auto number) {
    if constexpr (std::floating_point<decltype(number)>) {
      out->Real(number);
    } else {
      out->Number(number);
    }
  });
}

// Thousands of requests fit no cache between two checkpoints: in turns, what the next ones will be asked for.
void PrefetchRequests(std::span<LiveRequest* const> requests, size_t i) {
  constexpr size_t kRequestsAhead = 12, kSequencesAhead = 8, kBlocksAhead = 4, kLine = 64;
  auto fetch = [](const void* from, size_t lines) {
    for (size_t at = 0; at < lines; ++at) __builtin_prefetch(static_cast<const char*>(from) + at * kLine);
  };
  if (i + kRequestsAhead < requests.size()) fetch(requests[i + kRequestsAhead], 2);
  if (i + kSequencesAhead < requests.size()) fetch(requests[i + kSequencesAhead]->sequences.data(), 2);
  if (i + kBlocksAhead < requests.size()) {
    const LiveRequest& request = *requests[i + kBlocksAhead];
    fetch(request.sequences.front().blocks.data() + request.said_blocks, 1);
  }
}

}  // namespace

void Scheduler::Impl::SayBeforeCheckpoint() {
  FlightRecorder& recorder = *options_.recorder;
  auto name = [this](BlockId block) -> const BlockHash& { return cache_.hash(block); };
  const FlightRecorder::Part part = recorder.NextToName(static_cast<size_t>(pool_.size()));
  const auto end = static_cast<BlockId>(part.end);
  for (auto block = static_cast<BlockId>(part.begin); block < end;) {
    const BlockId first = block, most = std::min(end, first + FlightRecorder::kMostNames);
    while (block < most && cache_.published(block)) ++block;
    if (block > first) recorder.OnPublish(first, block - first, name);
    while (block < end && !cache_.published(block)) ++block;
  }
  const FlightRecorder::Part requests = recorder.NextToSay(all_live_.size());
  for (size_t i = requests.begin; i < requests.end; ++i) Say(all_live_[i]);
}

// A request that decodes, of one sequence: until its blocks are released all of it stays so but for how far it has come
// and for further blocks and their names.
void Scheduler::Impl::Say(LiveRequest* request) const {
  const Sequence& sequence = request->sequences.front();
  if (request->sequences.size() > 1 || request->leader != nullptr || !request->scoring_complete() ||
      sequence.state != Sequence::State::kRunning || request->said_in == checkpoint_ ||
      !options_.recorder->makes_checkpoints()) {
    return;
  }
  FlightFrameWriter* out = options_.recorder->BeginRequest();
  out->Room(MostBytes(*request));
  WriteRequest(*request, out);
  options_.recorder->EndRequest();
  request->said_in = checkpoint_;
  request->said_blocks = static_cast<int32_t>(sequence.blocks.size());
  request->said_names = static_cast<int32_t>(sequence.hashes.size());
}

// A victim of a plan that planned nothing may wait while it is still part of the step before: soon it will not be.
bool Scheduler::Impl::CanCheckpoint() const {
  auto in_flight = [&](const Sequence* s) { return !in_flight_.empty() && s->last_step == in_flight_.back().step; };
  return std::ranges::none_of(accounts_,
                              [&](const Account& account) { return std::ranges::any_of(account.waiting, in_flight); });
}

bool Scheduler::Impl::WriteCheckpoint(TimePoint now, FlightFrameWriter* out) {
  const uint32_t checkpoint = checkpoint_++;
  if (!HasRoomForBlocks(*out)) return false;
  out->Time(now);
  out->Number(step_);
  out->Number(arrivals_);
  out->Number(options_.learn_step_cost);
  if (options_.learn_step_cost) PutLearner(learner_, out);
  out->Signed(share_.floor());
  out->Number(accounts_.size());
  for (size_t i = 0; i < accounts_.size(); ++i) {
    const FairShare::Service& service = share_.service(i);
    for (int64_t value : {service.level, service.pending, service.remainder}) out->Signed(value);
  }
  out->Number(free_slots_.size());
  for (int32_t slot : free_slots_) out->Number(static_cast<uint64_t>(slot));
  WriteBlocks(out);

  out->Number(all_live_.size());
  for (size_t i = 0; i < all_live_.size(); ++i) {
    PrefetchRequests(all_live_, i);
    const LiveRequest& request = *all_live_[i];
    const bool said = request.said_in == checkpoint;
    if (!out->HasRoom(1 + (said ? MostSaidBytes(request) : MostBytes(request)))) return false;
    out->Number(said);
    said ? WriteSaidRequest(request, out) : WriteRequest(request, out);
  }
  if (!HasRoomForRest(*out)) return false;
  out->Number(sharing_.size());
  for (const LiveRequest* request : sharing_) out->Number(request->key);
  out->Number(blocked_ != nullptr);
  if (blocked_ != nullptr) {
    out->Number(blocked_->request->key);
    out->Number(blocked_->index);
    out->Number(static_cast<uint64_t>(blocked_until_available_));
    out->Number(blocked_until_step_);
  }
  out->Number(in_flight_.size());
  for (const InFlight& in_flight : in_flight_) {
    PutPlanned(*in_flight.plan, out);
    out->End(PutBlocks(in_flight.retired, out->End()));
  }
  out->Number(cancels_.size());
  for (const auto& [key, why] : cancels_) {
    out->Number(key);
    out->Number(static_cast<uint64_t>(why.code()));
  }
  out->Number(stops_.size());
  for (const auto& [key, sequence] : stops_) {
    out->Number(key);
    out->Number(sequence);
  }
  return true;
}

// For the step in flight and the other things behind the requests.
bool Scheduler::Impl::HasRoomForRest(const FlightFrameWriter& out) const {
  constexpr size_t kNumbers = 100, kPlanned = 50, kKey = 20;
  size_t bytes = kNumbers + kKey * (sharing_.size() + cancels_.size() + stops_.size());
  for (const InFlight& in_flight : in_flight_) {
    bytes += kPlanned * in_flight.sequences.size() + kMostBlockBytes * in_flight.retired.size();
  }
  return out.HasRoom(bytes);
}

// For them and for what comes before them.
bool Scheduler::Impl::HasRoomForBlocks(const FlightFrameWriter& out) const {
  constexpr size_t kHeader = 4096, kAccount = 30, kSlot = 5;
  return out.HasRoom(kHeader + kAccount * accounts_.size() + kSlot * free_slots_.size() +
                     2 * pool_.all_kept().words().size_bytes() +
                     sizeof(uint64_t) * static_cast<size_t>(pool_.num_cached()));
}

// Who is held follows from whose they are, and their names have been said (NameBlocks).
void Scheduler::Impl::WriteBlocks(FlightFrameWriter* out) const {
  out->Number(pool_.all_kept().words().size());
  for (const BlockBits* bits : {&pool_.all_kept(), &pool_.all_valued()}) {
    out->Bytes(bits->words().data(), bits->words().size_bytes());
  }
  out->Number(static_cast<uint64_t>(pool_.num_cached()));
  uint8_t* at = out->End();
  const std::span<const uint64_t> words = pool_.all_cached().words();
  for (size_t i = 0; i < words.size(); ++i) {
    for (uint64_t word = words[i]; word != 0; word &= word - 1) {
      const uint64_t cached_at = pool_.cached_at(static_cast<BlockId>(64 * i) + std::countr_zero(word));
      std::memcpy(at, &cached_at, sizeof cached_at);
      at += sizeof cached_at;
    }
  }
  out->End(at);
}

// Where there is room for MostBytes.
void Scheduler::Impl::WriteRequest(const LiveRequest& request, FlightFrameWriter* out) const {
  uint8_t* at = out->End();
  std::memcpy(at, request.arrival.data(), request.arrival.size());
  at += request.arrival.size();
  at = PutNumber(request.order, at);
  at = PutNumber(uint64_t{request.hurries} << 1 | uint64_t{request.admitted}, at);
  at = PutSigned(request.start_by.time_since_epoch().count(), at);
  // Nobody is asked once it was admitted.
  at = PutSigned(request.admitted ? 0 : (request.request->deadline - request.hopeless_at).count(), at);
  at = PutNumber(static_cast<uint64_t>(request.scored), at);
  at = PutNumber(request.leader == nullptr ? 0 : request.leader->index + uint64_t{1}, at);
  at = PutBlocks(request.shared, at);
  const auto in_prompt = static_cast<size_t>(request.prompt_size >> block_shift_);
  at = PutNumber(in_prompt, at);
  std::span<const BlockId> of_prompt = request.shared;
  bool running_before = false;
  for (const Sequence& sequence : request.sequences) {
    at = PutNumber(static_cast<uint64_t>(sequence.state) << 1 | uint64_t{sequence.admitted}, at);
    if (sequence.state == Sequence::State::kEnded) continue;
    for (int32_t count : {static_cast<int32_t>(sequence.generated.size()), sequence.charged, sequence.preempted}) {
      at = PutNumber(static_cast<uint64_t>(count), at);
    }
    std::span<const BlockId> behind_prompt;
    if (sequence.state == Sequence::State::kRunning) {
      for (int32_t count : {sequence.slot, sequence.scheduled, sequence.computed, sequence.published}) {
        at = PutNumber(static_cast<uint64_t>(count), at);
      }
      at = PutBlocks(sequence.blocks, at);
      behind_prompt = std::span(sequence.blocks).subspan(std::min(in_prompt, sequence.blocks.size()));
      if (!running_before) of_prompt = sequence.blocks;
      running_before = true;
    }
    at = PutNames(sequence.hashes, behind_prompt, at);
  }
  out->End(PutNames(request.prompt_hashes, of_prompt, at));
}

// What has changed since it was said.
void Scheduler::Impl::WriteSaidRequest(const LiveRequest& request, FlightFrameWriter* out) const {
  const Sequence& sequence = request.sequences.front();
  uint8_t* at = PutNumber(request.key, out->End());
  for (int32_t count : {static_cast<int32_t>(sequence.generated.size()), sequence.charged, sequence.slot,
                        sequence.scheduled, sequence.computed, sequence.published}) {
    at = PutNumber(static_cast<uint64_t>(count), at);
  }
  const std::span<const BlockId> blocks = sequence.blocks;
  at = PutBlocks(blocks.subspan(static_cast<size_t>(request.said_blocks)), at);
  const auto said_names = static_cast<size_t>(request.said_names);
  const size_t named = static_cast<size_t>(request.prompt_size >> block_shift_) + said_names;
  out->End(
      PutNames(std::span(sequence.hashes).subspan(said_names), blocks.subspan(std::min(named, blocks.size())), at));
}

// How many there are; then in turns, so many that are the names of `blocks` at the same places, and so many others with
// these. A block of a sequence that has a name has the one that the sequence knows there.
uint8_t* Scheduler::Impl::PutNames(std::span<const BlockHash> names, std::span<const BlockId> blocks,
                                   uint8_t* at) const {
  at = PutNumber(names.size(), at);
  auto is_of_block = [&](size_t i) { return i < blocks.size() && cache_.published(blocks[i]); };
  for (size_t i = 0; i < names.size();) {
    const size_t begin = i;
    while (i < names.size() && is_of_block(i)) ++i;
    const size_t others = i;
    while (i < names.size() && !is_of_block(i)) ++i;
    at = PutNumber(others - begin, at);
    at = PutNumber(i - others, at);
    for (size_t other = others; other < i; ++other, at += sizeof(uint64_t)) {
      std::memcpy(at, names[other].data(), sizeof(uint64_t));
    }
  }
  return at;
}

}  // namespace altiplano

// The scheduler's state as a frame of a flight record: what FlightCheckpoint says, in its order. Linear in the state.
#include <algorithm>
#include <concepts>

#include "server/scheduler/flight_frame_writer.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/scheduler_impl.h"

namespace altiplano {

namespace {

// Neighbours in a table were often taken one after the other.
void PutBlocks(std::span<const BlockId> blocks, FlightFrameWriter* out) {
  out->Number(blocks.size());
  BlockId last = 0;
  for (BlockId block : blocks) {
    out->Signed(block - last);
    last = block;
  }
}

void PutName(const BlockHash& name, FlightFrameWriter* out) {
  out->Bytes(name.data(), sizeof(uint64_t));
}

// Of what WriteRequest writes.
size_t MostBytes(const LiveRequest& request) {
  constexpr size_t kBlock = 5, kName = 16, kSequence = 160, kRequest = 300;
  size_t bytes = kRequest + request.request->id.size() + request.request->tenant.size() +
                 kBlock * request.shared.size() + kName * request.prompt_hashes.size();
  for (const Sequence& sequence : request.sequences) {
    bytes += kSequence + kBlock * sequence.blocks.size() + kName * sequence.hashes.size();
  }
  return bytes;
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

}  // namespace

bool Scheduler::Impl::WriteCheckpoint(TimePoint now, FlightFrameWriter* out) const {
  // A victim of a plan that planned nothing may wait while it is still part of the step before: soon it will not be.
  for (const Account& account : accounts_) {
    auto in_flight = [&](const Sequence* s) { return !in_flight_.empty() && s->last_step == in_flight_.back().step; };
    if (std::ranges::any_of(account.waiting, in_flight)) return false;
  }
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

  out->Number(live_.size());
  for (const auto& [key, request] : live_) {
    if (!out->HasRoom(MostBytes(*request))) return false;
    WriteRequest(*request, out);
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
    PutBlocks(in_flight.retired, out);
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
  constexpr size_t kNumbers = 100, kPlanned = 50, kRetired = 5, kKey = 20;
  size_t bytes = kNumbers + kKey * (sharing_.size() + cancels_.size() + stops_.size());
  for (const InFlight& in_flight : in_flight_) {
    bytes += kPlanned * in_flight.sequences.size() + kRetired * in_flight.retired.size();
  }
  return out.HasRoom(bytes);
}

// For them and for what comes before them.
bool Scheduler::Impl::HasRoomForBlocks(const FlightFrameWriter& out) const {
  constexpr size_t kHeader = 4096, kAccount = 30, kSlot = 5, kHeld = 13, kCached = sizeof(uint64_t);
  return out.HasRoom(kHeader + kAccount * accounts_.size() + kSlot * free_slots_.size() +
                     kHeld * static_cast<size_t>(pool_.num_held()) + kCached * static_cast<size_t>(pool_.num_cached()));
}

void Scheduler::Impl::WriteBlocks(FlightFrameWriter* out) const {
  out->Number(static_cast<uint64_t>(pool_.num_held()));
  BlockId last = 0;
  for (BlockId block = 0; block < pool_.size(); ++block) {
    if (pool_.refs(block) == 0) continue;
    const bool published = cache_.published(block);
    out->Number(static_cast<uint64_t>(block - last) << 2 | uint64_t{pool_.valued(block)} << 1 | uint64_t{published});
    if (published) PutName(cache_.hash(block), out);
    last = block;
  }
  for (bool valued : {false, true}) {
    out->Number(static_cast<uint64_t>(pool_.num_cached(valued)));
    for (BlockId block = pool_.oldest_cached(valued); block >= 0; block = pool_.younger(block)) {
      PutName(cache_.hash(block), out);
    }
  }
}

void Scheduler::Impl::WriteRequest(const LiveRequest& request, FlightFrameWriter* out) const {
  PutArrival(request.key, *request.request, out);
  out->Number(request.order);
  out->Number(uint64_t{request.hurries} << 1 | uint64_t{request.admitted});
  out->Time(request.start_by);
  out->Signed((request.request->deadline - request.hopeless_at).count());
  out->Number(static_cast<uint64_t>(request.scored));
  out->Number(request.leader == nullptr ? 0 : request.leader->index + uint64_t{1});
  PutBlocks(request.shared, out);
  auto running = [](const Sequence& sequence) { return sequence.state == Sequence::State::kRunning; };
  const auto in_prompt = static_cast<size_t>(request.prompt_size / options_.block_size);
  out->Number(in_prompt);
  for (const Sequence& sequence : request.sequences) {
    out->Number(static_cast<uint64_t>(sequence.state) << 1 | uint64_t{sequence.admitted});
    if (sequence.state == Sequence::State::kEnded) continue;
    for (int32_t count : {static_cast<int32_t>(sequence.generated.size()), sequence.charged, sequence.preempted}) {
      out->Number(static_cast<uint64_t>(count));
    }
    std::span<const BlockId> behind_prompt;
    if (running(sequence)) {
      for (int32_t count : {sequence.slot, sequence.scheduled, sequence.computed, sequence.published}) {
        out->Number(static_cast<uint64_t>(count));
      }
      PutBlocks(sequence.blocks, out);
      behind_prompt = std::span(sequence.blocks).subspan(std::min(in_prompt, sequence.blocks.size()));
    }
    WriteNames(sequence.hashes, behind_prompt, out);
  }
  const auto it = std::ranges::find_if(request.sequences, running);
  WriteNames(request.prompt_hashes, it != request.sequences.end() ? it->blocks : request.shared, out);
}

// How many there are; then in turns, so many that are the names of `blocks` at the same places, and so many others with
// these.
void Scheduler::Impl::WriteNames(std::span<const BlockHash> names, std::span<const BlockId> blocks,
                                 FlightFrameWriter* out) const {
  out->Number(names.size());
  auto is_of_block = [&](size_t i) {
    return i < blocks.size() && cache_.published(blocks[i]) && cache_.hash(blocks[i]) == names[i];
  };
  for (size_t i = 0; i < names.size();) {
    const size_t begin = i;
    while (i < names.size() && is_of_block(i)) ++i;
    const size_t others = i;
    while (i < names.size() && !is_of_block(i)) ++i;
    out->Number(others - begin);
    out->Number(i - others);
    for (size_t other = others; other < i; ++other) PutName(names[other], out);
  }
}

}  // namespace altiplano

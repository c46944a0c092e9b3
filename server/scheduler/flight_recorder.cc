#include "server/scheduler/flight_recorder.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "server/base/check.h"
#include "server/base/sha256.h"
#include "server/scheduler/flight_options.h"

namespace altiplano {

namespace {

constexpr size_t kMostNumberBytes = 10;
constexpr size_t kMostPlannedBytes = 5 * kMostNumberBytes;

uint8_t* PutNumber(uint64_t value, uint8_t* at) {
  for (; value >= 0x80; value >>= 7) *at++ = static_cast<uint8_t>(value | 0x80);
  *at++ = static_cast<uint8_t>(value);
  return at;
}
uint64_t ZigZag(int64_t value) {
  return (static_cast<uint64_t>(value) << 1) ^ static_cast<uint64_t>(value >> 63);
}

void AppendNumber(uint64_t value, std::string* out) {
  uint8_t bytes[kMostNumberBytes];
  out->append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(PutNumber(value, bytes) - bytes));
}
void AppendSigned(int64_t value, std::string* out) {
  AppendNumber(ZigZag(value), out);
}

struct OptionWriter {
  std::string* out;
  void operator()(bool value) const { AppendNumber(value, out); }
  void operator()(int32_t value) const { AppendSigned(value, out); }
  void operator()(Duration value) const { AppendSigned(value.count(), out); }
  void operator()(const std::vector<TenantOptions>& tenants) const {
    AppendNumber(tenants.size(), out);
    for (const TenantOptions& tenant : tenants) {
      AppendNumber(tenant.name.size(), out);
      out->append(tenant.name);
      for (int64_t value : {int64_t{tenant.weight}, int64_t{tenant.max_running}, int64_t{tenant.max_queued_requests},
                            tenant.max_queued_tokens}) {
        AppendSigned(value, out);
      }
    }
  }
  void operator()(double value) const {
    const auto bits = std::bit_cast<uint64_t>(value);
    for (int shift = 0; shift < 64; shift += 8) out->push_back(static_cast<char>(bits >> shift));
  }
};

std::string HeaderOf(const SchedulerOptions& options) {
  std::string out(kFlightMagic);
  for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>(kFlightVersion >> shift));
  VisitFlightOptions(options, OptionWriter{&out});
  return out;
}

}  // namespace

// --- Frames ----------------------------------------------------------------------------------------------------------

void FlightRecorder::Frame::Signed(int64_t value) {
  Number(ZigZag(value));
}

void FlightRecorder::Frame::Room(size_t more) {
  if (buffer_.size() - size_ < more) buffer_.resize(std::max(2 * buffer_.size(), size_ + more));
}

void FlightRecorder::Frame::Begin(FlightKind kind) {
  size_ = 0;
  Room(1);
  buffer_[size_++] = static_cast<uint8_t>(kind);
}

void FlightRecorder::Frame::Number(uint64_t value) {
  Room(kMostNumberBytes);
  End(PutNumber(value, End()));
}

void FlightRecorder::Frame::Bytes(const void* data, size_t size) {
  Room(size);
  if (size > 0) std::memcpy(buffer_.data() + size_, data, size);
  size_ += size;
}

// --- The ring --------------------------------------------------------------------------------------------------------

FlightRecorder::FlightRecorder(const SchedulerOptions& options, size_t bytes)
    : header_(HeaderOf(options)), ring_(bytes) {
  CHECK(bytes > 0);
  const auto most = static_cast<size_t>(std::max(0, options.max_running));  // nobody has checked the options yet
  frame_.Room(most * kMostPlannedBytes);
  names_.Room(1 << 16);
  preempted_.reserve(most);
}

void FlightRecorder::Put(std::span<const uint8_t> bytes) {
  const size_t at = (begin_ + used_) % ring_.size();
  const size_t first = std::min(bytes.size(), ring_.size() - at);
  std::memcpy(ring_.data() + at, bytes.data(), first);
  if (first < bytes.size()) std::memcpy(ring_.data(), bytes.data() + first, bytes.size() - first);
  used_ += bytes.size();
}

void FlightRecorder::DropOldest() {
  size_t at = begin_, length = 0, length_bytes = 0;
  for (uint8_t byte = 0x80; (byte & 0x80) != 0; at = (at + 1) % ring_.size()) {
    byte = ring_[at];
    length |= static_cast<size_t>(byte & 0x7f) << (7 * length_bytes++);
  }
  dropped_steps_ += ring_[at] == static_cast<uint8_t>(FlightKind::kResult);
  ++dropped_frames_;
  begin_ = (begin_ + length_bytes + length) % ring_.size();
  used_ -= length_bytes + length;
}

void FlightRecorder::Keep(Frame* frame) {
  uint8_t length[kMostNumberBytes];
  const auto length_bytes = static_cast<size_t>(PutNumber(frame->bytes().size(), length) - length);
  const size_t size = length_bytes + frame->bytes().size();

  std::lock_guard lock(mutex_);
  while (used_ > 0 && ring_.size() - used_ < size) DropOldest();
  if (size <= ring_.size()) {
    Put({length, length_bytes});
    Put(frame->bytes());
  } else {
    ++dropped_frames_;
  }
  frame->Clear();
}

std::string FlightRecorder::Write(TimePoint now, int64_t unix_ns) const {
  std::string out = header_;
  AppendSigned(unix_ns, &out);
  AppendSigned(now.time_since_epoch().count(), &out);
  {
    std::lock_guard lock(mutex_);
    AppendNumber(dropped_frames_, &out);
    AppendNumber(dropped_steps_, &out);
    const size_t first = std::min(used_, ring_.size() - begin_);
    out.append(reinterpret_cast<const char*>(ring_.data()) + begin_, first);
    out.append(reinterpret_cast<const char*>(ring_.data()), used_ - first);
  }
  Sha256 sha;
  sha.Update(out.data(), out.size());
  const Sha256Digest digest = sha.Finish();
  out.append(reinterpret_cast<const char*>(digest.data()), digest.size());
  return out;
}

// --- What happens ----------------------------------------------------------------------------------------------------

void FlightRecorder::OnArrival(RequestKey key, const Request& request) {
  frame_.Begin(FlightKind::kArrival);
  frame_.Number(key);
  frame_.Text(request.id);
  frame_.Text(request.tenant);
  frame_.Number(request.prompt.size());
  frame_.Number(static_cast<uint64_t>(request.num_sequences));
  frame_.Number(static_cast<uint64_t>(request.stop.max_new_tokens));
  frame_.Signed(request.priority);
  frame_.Number(request.bypass_prefix_cache);
  frame_.Number(request.sampling.prompt_top_logprobs >= 0);
  for (TimePoint time : {request.arrival, request.queue_deadline, request.deadline, request.time_limit}) {
    frame_.Time(time);
  }
  frame_.Signed(request.ttft_target.count());
  Keep(&frame_);
}

void FlightRecorder::OnCancel(RequestKey key, Code code) {
  frame_.Begin(FlightKind::kCancel);
  frame_.Number(key);
  frame_.Number(static_cast<uint64_t>(code));
  Keep(&frame_);
}

void FlightRecorder::OnStop(RequestKey key, uint32_t sequence) {
  frame_.Begin(FlightKind::kStop);
  frame_.Number(key);
  frame_.Number(sequence);
  Keep(&frame_);
}

void FlightRecorder::OnCacheReset() {
  frame_.Begin(FlightKind::kCacheReset);
  Keep(&frame_);
}

void FlightRecorder::OnAbort(TimePoint now) {
  FlushNames();
  frame_.Begin(FlightKind::kAbort);
  frame_.Time(now);
  Keep(&frame_);
}

void FlightRecorder::OnBlockName(RequestKey key, uint32_t sequence, int32_t block, const BlockHash& name) {
  if (names_.empty() || key != names_key_ || sequence != names_sequence_ || block != names_next_) {
    FlushNames();
    names_.Begin(FlightKind::kNames);
    names_.Number(key);
    names_.Number(sequence);
    names_.Number(static_cast<uint64_t>(block));
    names_key_ = key;
    names_sequence_ = sequence;
  }
  names_next_ = block + 1;
  names_.Bytes(name.data(), sizeof(uint64_t));
}

void FlightRecorder::FlushNames() {
  if (!names_.empty()) Keep(&names_);
}

void FlightRecorder::OnPreempt(RequestKey key, uint32_t sequence) {
  preempted_.push_back({key, sequence});
}

void FlightRecorder::AddEnds(std::span<const Event> events) {
  for (const Event& event : events) {
    const bool request = event.kind == Event::Kind::kEnded;
    if (!request && event.finish == FinishReason::kNone) continue;
    frame_.Number(1);
    frame_.Number(event.request);
    frame_.Number(request ? FlightEnd::kRequest : event.sequence);
    frame_.Number(request ? static_cast<uint64_t>(event.status.code()) : static_cast<uint64_t>(event.finish));
    frame_.Number(event.kind == Event::Kind::kToken);
  }
  frame_.Number(0);
}

void FlightRecorder::OnPlan(TimePoint now, const StepPlan* plan, const PlanNotes& notes,
                            std::span<const Event> events) {
  FlushNames();
  frame_.Begin(FlightKind::kPlan);
  frame_.Time(now);
  frame_.Number(plan == nullptr ? 0 : plan->step);
  frame_.Number(static_cast<uint64_t>(notes.why));
  frame_.Number(static_cast<uint64_t>(notes.waiting));
  frame_.Number(notes.head);
  frame_.Number(notes.head_sequence);
  frame_.Number(static_cast<uint64_t>(notes.blocks_held));
  frame_.Number(static_cast<uint64_t>(notes.blocks_cached));
  frame_.Number(plan == nullptr ? 0 : static_cast<uint64_t>(plan->num_prefill_tokens));
  frame_.Number(preempted_.size());
  for (const FlightPreempted& preempted : preempted_) {
    frame_.Number(preempted.key);
    frame_.Number(preempted.sequence);
  }
  preempted_.clear();
  AddEnds(events);
  const size_t count = plan == nullptr ? 0 : plan->sequences.size();
  frame_.Number(count);
  frame_.Room(count * kMostPlannedBytes);
  uint8_t* at = frame_.End();
  RequestKey last = 0;
  size_t init = 0;
  for (size_t i = 0; i < count; ++i) {
    const PlannedSequence& planned = plan->sequences[i];
    const bool admitted = init < plan->slot_inits.size() && plan->slot_inits[init].slot == planned.slot;
    init += admitted;
    at = PutNumber(ZigZag(static_cast<int64_t>(planned.request - last)), at);  // small: the order is that of arrival
    last = planned.request;
    at = PutNumber(uint64_t{planned.sequence} << 3 | uint64_t{planned.num_prompt_scores > 0} << 2 |
                       uint64_t{admitted} << 1 | uint64_t{planned.sample},
                   at);
    at = PutNumber(static_cast<uint64_t>(planned.slot), at);
    at = PutNumber(static_cast<uint64_t>(planned.first_position), at);
    at = PutNumber(static_cast<uint64_t>(planned.num_tokens), at);
  }
  frame_.End(at);
  Keep(&frame_);
}

void FlightRecorder::OnResult(TimePoint now, const StepPlan& plan, const StepResult& result,
                              std::span<const Event> events) {
  FlushNames();
  frame_.Begin(FlightKind::kResult);
  frame_.Time(now);
  frame_.Number(plan.step);
  frame_.Number(static_cast<uint64_t>(result.device_time.count()));
  size_t sampled = 0, scored = 0, non_finite = 0;
  auto all_finite = [](const std::vector<TokenScore>& scores) {
    return std::ranges::all_of(scores, &TokenScore::finite);
  };
  for (const TokenScore& score : result.sampled) non_finite += !score.finite;
  for (const std::vector<TokenScore>& scores : result.prompt_scores) non_finite += !all_finite(scores);
  if (non_finite == 0) {
    frame_.Number(0);
  } else {
    std::vector<uint32_t> indices;  // rare enough to allocate
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      const PlannedSequence& planned = plan.sequences[i];
      bool finite = true;
      if (planned.sample) finite &= result.sampled[sampled++].finite;
      if (planned.num_prompt_scores > 0) finite &= all_finite(result.prompt_scores[scored++]);
      if (!finite) indices.push_back(static_cast<uint32_t>(i));
    }
    frame_.Number(indices.size());
    for (uint32_t index : indices) frame_.Number(index);
  }
  AddEnds(events);
  Keep(&frame_);
}

}  // namespace altiplano

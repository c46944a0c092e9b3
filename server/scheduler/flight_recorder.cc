#include "server/scheduler/flight_recorder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "server/base/check.h"
#include "server/scheduler/flight_options.h"

namespace altiplano {

namespace {

constexpr size_t kMostPlannedBytes = 5 * kMostNumberBytes;
constexpr size_t kBlockNamesBytes = 1 << 16;  // in one frame

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

// --- The ring --------------------------------------------------------------------------------------------------------

size_t FlightRecorder::LeastBytes(int32_t num_blocks) {
  // A block's name, said before a checkpoint; in it the time since when it is cached, and two bits.
  constexpr size_t kNameAndTime = 2 * sizeof(uint64_t), kBlocksInAByte = 4, kRest = 4096;
  const auto blocks = static_cast<size_t>(num_blocks);
  return 4 * (kNameAndTime * blocks + blocks / kBlocksInAByte + kRest);
}

FlightRecorder::FlightRecorder(const SchedulerOptions& options, size_t bytes, size_t between)
    : header_(HeaderOf(options)), between_(between), ring_(bytes) {
  CHECK(bytes > 0);
  const auto most = static_cast<size_t>(std::max(0, options.max_running));  // nobody has checked the options yet
  frame_.Room(most * kMostPlannedBytes);
  names_.Room(1 << 16);
  if (makes_checkpoints()) {
    checkpoint_.Room(bytes / 4);
    block_names_.Room(kBlockNamesBytes);
    request_.Room(1 << 16);
  }
  preempted_.reserve(most);
}

void FlightRecorder::WriteAtCrash(std::string path) {
  CHECK(!crash_);
  crash_path_ = std::move(path);
  Sha256().Finish();  // looks once at what the CPU has, behind a lock
  LastAct* const self = this;
  crash_.emplace(self);
}

void FlightRecorder::Put(std::span<const uint8_t> bytes, uint64_t at) {
  const size_t from = at % ring_.size();
  const size_t first = std::min(bytes.size(), ring_.size() - from);
  std::memcpy(ring_.data() + from, bytes.data(), first);
  if (first < bytes.size()) std::memcpy(ring_.data(), bytes.data() + first, bytes.size() - first);
}

void FlightRecorder::DropOldest() {
  uint64_t at = begin_;
  size_t length = 0, length_bytes = 0;
  for (uint8_t byte = 0x80; (byte & 0x80) != 0; ++at) {
    byte = ring_[at % ring_.size()];
    length |= static_cast<size_t>(byte & 0x7f) << (7 * length_bytes++);
  }
  if (ring_[at % ring_.size()] == static_cast<uint8_t>(FlightKind::kResult)) ++dropped_steps_;
  ++dropped_frames_;
  begin_ = at + length;
}

void FlightRecorder::Keep(FlightFrameWriter* frame) {
  uint8_t length[kMostNumberBytes];
  const auto length_bytes = static_cast<size_t>(PutNumber(frame->bytes().size(), length) - length);
  const size_t size = length_bytes + frame->bytes().size();

  std::lock_guard lock(mutex_);
  keeping_ = true;
  if (!crashed_) {
    const uint64_t end = end_;
    while (end > begin_ && ring_.size() - (end - begin_) < size) DropOldest();
    if (size <= ring_.size()) {
      Put({length, length_bytes}, end);
      Put(frame->bytes(), end + length_bytes);
      end_ = end + size;
    } else {
      ++dropped_frames_;
    }
  }
  keeping_ = false;
  frame->Clear();
}

void FlightRecorder::KeepSaid(FlightFrameWriter* frame) {
  const uint64_t before = end_;
  Keep(frame);
  said_ += end_ - before;
}

template <typename Sink>
void FlightRecorder::Emit(TimePoint now, int64_t unix_ns, const Sink& sink) const {
  Sha256 sha;
  auto emit = [&](const void* data, size_t size) {
    sha.Update(data, size);
    sink(data, size);
  };
  emit(header_.data(), header_.size());
  uint8_t numbers[4 * kMostNumberBytes];
  uint8_t* at = PutNumber(ZigZag(unix_ns), numbers);
  at = PutNumber(ZigZag(now.time_since_epoch().count()), at);
  at = PutNumber(dropped_frames_, at);
  at = PutNumber(dropped_steps_, at);
  emit(numbers, static_cast<size_t>(at - numbers));
  const uint64_t begin = begin_, used = end_ - begin;
  const size_t from = begin % ring_.size();
  const size_t first = std::min<uint64_t>(used, ring_.size() - from);
  emit(ring_.data() + from, first);
  emit(ring_.data(), used - first);
  const Sha256Digest digest = sha.Finish();
  sink(digest.data(), digest.size());
}

std::string FlightRecorder::Write(TimePoint now, int64_t unix_ns) const {
  std::string out;
  std::lock_guard lock(mutex_);
  Emit(now, unix_ns, [&out](const void* data, size_t size) { out.append(static_cast<const char*>(data), size); });
  return out;
}

void FlightRecorder::OnCrash(int signal) noexcept {
  // The scheduler's thread still runs, unless it is this one. What it is about to keep, it finishes or gives up; if it
  // cannot, the frames before are whole all the same.
  crashed_ = true;
  const timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
  for (int ms = 0; ms < 100 && keeping_; ++ms) nanosleep(&pause, nullptr);

  int error = 0;
  const int fd = open(crash_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) error = errno;
  if (error == 0) {
    timespec unix_time{};
    clock_gettime(CLOCK_REALTIME, &unix_time);
    Emit(std::chrono::steady_clock::now(), unix_time.tv_sec * int64_t{1'000'000'000} + unix_time.tv_nsec,
         [&](const void* data, size_t size) {
           for (auto* at = static_cast<const char*>(data); size > 0 && error == 0;) {
             const ssize_t written = write(fd, at, size);
             if (written < 0 && errno == EINTR) continue;
             if (written <= 0) {
               error = written < 0 ? errno : EIO;
               break;
             }
             at += written;
             size -= static_cast<size_t>(written);
           }
         });
    if (close(fd) != 0 && error == 0) error = errno;
  }
  if (error == 0) {
    crash::Say({"altiplano: ", crash::SignalName(signal), ": the scheduler's last steps are in ", crash_path_,
                ", for altiplano replay"});
  } else {
    crash::Say({"altiplano: ", crash::SignalName(signal), ": the scheduler's last steps cannot be written to ",
                crash_path_, ": error ", crash::Digits(static_cast<unsigned>(error)).text(), " of the system"});
  }
}

// --- Checkpoints -----------------------------------------------------------------------------------------------------

// A little faster than other frames fill what lies between two checkpoints; all that is left when one is due.
FlightRecorder::Part FlightRecorder::Next(size_t total, size_t* next) const {
  if (!makes_checkpoints()) return {};
  const double share = std::min(1.0, 1.25 * static_cast<double>(others()) / static_cast<double>(between_));
  const size_t begin = std::min(*next, total);
  *next = std::max(begin, static_cast<size_t>(share * static_cast<double>(total)));
  return {begin, *next};
}

FlightFrameWriter* FlightRecorder::BeginRequest() {
  FlushNames();
  request_.Begin(FlightKind::kSaidRequest);
  return &request_;
}

FlightFrameWriter* FlightRecorder::BeginCheckpoint() {
  FlushNames();
  FlushBlockNames();
  checkpoint_.Begin(FlightKind::kCheckpoint);
  return &checkpoint_;
}

void FlightRecorder::EndCheckpoint(bool whole) {
  if (whole) Keep(&checkpoint_);
  checkpointed_ = end_;
  said_ = 0;
  next_to_name_ = next_to_say_ = 0;
}

// --- What happens ----------------------------------------------------------------------------------------------------

void PutArrival(RequestKey key, const Request& request, FlightFrameWriter* out) {
  out->Number(key);
  out->Text(request.id);
  out->Text(request.tenant);
  out->Number(request.prompt.size());
  out->Number(static_cast<uint64_t>(request.num_sequences));
  out->Number(static_cast<uint64_t>(request.stop.max_new_tokens));
  out->Signed(request.priority);
  out->Number(request.bypass_prefix_cache);
  out->Number(request.sampling.prompt_top_logprobs >= 0);
  for (TimePoint time : {request.arrival, request.queue_deadline, request.deadline, request.time_limit}) {
    out->Time(time);
  }
  out->Signed(request.ttft_target.count());
}

void FlightRecorder::OnArrival(RequestKey key, const Request& request) {
  frame_.Begin(FlightKind::kArrival);
  PutArrival(key, request, &frame_);
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

// Where the names go.
uint8_t* FlightRecorder::BeginBlockNames(BlockId first, int32_t count) {
  const size_t bytes = 2 * kMostNumberBytes + sizeof(uint64_t) * static_cast<size_t>(count);
  if (!block_names_.HasRoom(bytes)) FlushBlockNames();
  if (block_names_.empty()) {
    block_names_.Begin(FlightKind::kBlockNames);
    block_named_ = 0;
  }
  block_names_.Room(bytes);
  uint8_t* at = PutNumber(ZigZag(int64_t{first} - block_named_), block_names_.End());
  block_named_ = first + count;
  return PutNumber(static_cast<uint64_t>(count), at);
}

void FlightRecorder::FlushBlockNames() {
  if (!block_names_.empty()) KeepSaid(&block_names_);
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

void PutPlanned(const StepPlan& plan, FlightFrameWriter* out) {
  const size_t count = plan.sequences.size();
  out->Number(count);
  out->Room(count * kMostPlannedBytes);
  uint8_t* at = out->End();
  RequestKey last = 0;
  size_t init = 0;
  for (size_t i = 0; i < count; ++i) {
    const PlannedSequence& planned = plan.sequences[i];
    const bool admitted = init < plan.slot_inits.size() && plan.slot_inits[init].slot == planned.slot;
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
  out->End(at);
}

void FlightRecorder::OnPlan(TimePoint now, const StepPlan* plan, const PlanNotes& notes,
                            std::span<const Event> events) {
  FlushNames();
  FlushBlockNames();
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
  if (plan != nullptr) {
    PutPlanned(*plan, &frame_);
  } else {
    frame_.Number(0);
  }
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

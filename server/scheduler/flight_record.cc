#include "server/scheduler/flight_record.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <span>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "server/base/sha256.h"
#include "server/base/strings.h"
#include "server/scheduler/flight_options.h"

namespace altiplano {

namespace {

constexpr size_t kDigestBytes = sizeof(Sha256Digest);
// Times within this of zero: sums and differences of a few cannot overflow.
constexpr int64_t kMostNanoseconds = int64_t{1} << 60;

// Reads numbers until one is wrong; from then on everything is zero and error() says what it was.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : left_(bytes) {}

  const std::string& error() const { return error_; }
  bool ok() const { return error_.empty(); }
  bool done() const { return !ok() || left_.empty(); }
  size_t left() const { return left_.size(); }
  void Fail(std::string what) {
    if (ok()) error_ = std::move(what);
    left_ = {};
  }

  uint64_t Number() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (left_.empty()) return Fail("it ends within a number"), 0;
      const auto byte = static_cast<uint8_t>(left_[0]);
      left_.remove_prefix(1);
      if (shift == 63 && byte > 1) break;
      value |= uint64_t{byte & 0x7fu} << shift;
      if ((byte & 0x80) == 0) return value;
    }
    Fail("a number has more than 64 bits");
    return 0;
  }
  int64_t Signed() {
    const uint64_t value = Number();
    return static_cast<int64_t>(value >> 1) ^ -static_cast<int64_t>(value & 1);
  }
  uint64_t UpTo(uint64_t most, const char* what) {
    const uint64_t value = Number();
    if (value <= most) return value;
    Fail(StrCat(what, " is ", value, ", at most ", most, " is possible"));
    return 0;
  }
  int32_t Count(const char* what) { return static_cast<int32_t>(UpTo(INT32_MAX, what)); }
  bool Flag(const char* what) { return UpTo(1, what) != 0; }
  int32_t Small(const char* what) {
    const int64_t value = Signed();
    if (value >= INT32_MIN && value <= INT32_MAX) return static_cast<int32_t>(value);
    Fail(StrCat(what, " is ", value, ", which has more than 32 bits"));
    return 0;
  }
  Duration Span(const char* what, int64_t most = kMostNanoseconds) {
    const int64_t value = Signed();
    if (value >= -most && value <= most) return Duration(value);
    Fail(StrCat(what, " is ", value, " ns, out of range"));
    return {};
  }
  TimePoint Time(const char* what) { return TimePoint(Span(what)); }
  TimePoint TimeOrNever(const char* what) {
    const std::string_view before = left_;
    if (Signed() == kNever.time_since_epoch().count()) return kNever;
    if (ok()) left_ = before;
    return Time(what);
  }
  std::string_view Bytes(size_t size, const char* what) {
    if (size > left_.size()) return Fail(StrCat(what, " reaches beyond its end")), "";
    const std::string_view bytes = left_.substr(0, size);
    left_.remove_prefix(size);
    return bytes;
  }
  std::string Text(const char* what) { return std::string(Bytes(Number(), what)); }
  uint64_t Fixed64(const char* what) {
    uint64_t value = 0;
    const std::string_view bytes = Bytes(8, what);
    for (size_t i = 0; i < bytes.size(); ++i) value |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
    return value;
  }
  // Of things that take at least `least` bytes each: more than fit are wrong before memory is asked for.
  size_t Length(size_t least, const char* what) {
    const uint64_t count = Number();
    if (count <= left_.size() / least) return static_cast<size_t>(count);
    Fail(StrCat("there are said to be ", count, " ", what, ", but only ", left_.size(), " bytes are left"));
    return 0;
  }

 private:
  std::string_view left_;
  std::string error_;
};

struct OptionReader {
  Reader& in;
  void operator()(bool& value) const { value = in.Flag("an option"); }
  void operator()(int32_t& value) const { value = in.Small("an option"); }
  void operator()(Duration& value) const { value = in.Span("an option"); }
  void operator()(std::vector<TenantOptions>& tenants) const {
    tenants.resize(in.Length(5, "tenants"));
    for (TenantOptions& tenant : tenants) {
      tenant.name = in.Text("a tenant's name");
      tenant.weight = in.Small("a weight");
      tenant.max_running = in.Small("a tenant's limit");
      tenant.max_queued_requests = in.Small("a tenant's limit");
      tenant.max_queued_tokens = in.Signed();
    }
  }
  void operator()(double& value) const { value = std::bit_cast<double>(in.Fixed64("an option")); }
};

FlightArrival ReadArrival(Reader& in) {
  FlightArrival arrival;
  arrival.key = in.Number();
  arrival.id = in.Text("the request id");
  arrival.tenant = in.Text("the tenant");
  arrival.prompt_tokens = in.Count("the prompt's length");
  arrival.num_sequences = in.Count("the number of sequences");
  arrival.max_new_tokens = in.Count("max_new_tokens");
  arrival.priority = in.Small("the priority");
  arrival.bypasses_cache = in.Flag("bypass_prefix_cache");
  arrival.scores_prompt = in.Flag("prompt_logprobs");
  arrival.arrival = in.Time("the arrival");
  arrival.queue_deadline = in.TimeOrNever("the queue deadline");
  arrival.deadline = in.TimeOrNever("the deadline");
  arrival.time_limit = in.TimeOrNever("the time limit");
  arrival.ttft_target = in.Span("the TTFT target");
  return arrival;
}

FlightCancel ReadCancel(Reader& in) {
  const RequestKey key = in.Number();
  return {key, static_cast<Code>(in.UpTo(static_cast<uint64_t>(Code::kUnauthenticated), "the code"))};
}

FlightStop ReadStop(Reader& in) {
  const RequestKey key = in.Number();
  return {key, static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the sequence"))};
}

FlightNames ReadNames(Reader& in) {
  FlightNames names;
  names.key = in.Number();
  names.sequence = static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the sequence"));
  names.first_block = in.Count("the first block");
  while (!in.done()) names.names.push_back(in.Fixed64("a block's name"));
  return names;
}

std::vector<FlightEnd> ReadEnds(Reader& in) {
  std::vector<FlightEnd> ends;
  while (in.Flag("whether another end follows")) {
    FlightEnd& end = ends.emplace_back();
    end.key = in.Number();
    end.sequence = static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the sequence"));
    if (end.sequence == FlightEnd::kRequest) {
      end.code = static_cast<Code>(in.UpTo(static_cast<uint64_t>(Code::kUnauthenticated), "the status code"));
    } else {
      end.finish = static_cast<FinishReason>(in.UpTo(static_cast<uint64_t>(FinishReason::kCancelled), "the finish"));
    }
    end.with_token = in.Flag("with_token");
  }
  return ends;
}

std::vector<FlightPlanned> ReadPlanned(Reader& in) {
  std::vector<FlightPlanned> list(in.Length(5, "planned sequences"));
  RequestKey last = 0;
  for (FlightPlanned& planned : list) {
    planned.key = last += static_cast<RequestKey>(in.Signed());
    const uint64_t flags = in.UpTo(uint64_t{UINT32_MAX} << 3 | 7, "the sequence");
    planned.sequence = static_cast<uint32_t>(flags >> 3);
    planned.scores = (flags & 4) != 0;
    planned.admitted = (flags & 2) != 0;
    planned.sample = (flags & 1) != 0;
    planned.slot = in.Count("the slot");
    planned.first_position = in.Count("the first position");
    planned.num_tokens = in.Count("the number of tokens");
  }
  return list;
}

FlightPlan ReadPlan(Reader& in) {
  FlightPlan plan;
  plan.now = in.Time("now");
  plan.step = in.Number();
  plan.notes.why =
      static_cast<PlanNotes::Why>(in.UpTo(static_cast<uint64_t>(PlanNotes::Why::kTenant), "the reason to wait"));
  plan.notes.waiting = in.Count("the number of waiting sequences");
  plan.notes.head = in.Number();
  plan.notes.head_sequence = static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the sequence"));
  plan.notes.blocks_held = in.Count("blocks held");
  plan.notes.blocks_cached = in.Count("blocks cached");
  plan.prefill_tokens = in.Count("the prefill tokens");
  plan.preempted.resize(in.Length(2, "preempted sequences"));
  for (FlightPreempted& preempted : plan.preempted) {
    preempted.key = in.Number();
    preempted.sequence = static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the sequence"));
  }
  plan.ends = ReadEnds(in);
  plan.sequences = ReadPlanned(in);
  return plan;
}

FlightResult ReadResult(Reader& in) {
  FlightResult result;
  result.now = in.Time("now");
  result.step = in.Number();
  result.device_time = Duration(static_cast<int64_t>(in.UpTo(kMostNanoseconds, "the device time")));
  result.non_finite.resize(in.Length(1, "non-finite results"));
  for (uint32_t& index : result.non_finite) index = static_cast<uint32_t>(in.UpTo(UINT32_MAX, "the index"));
  result.ends = ReadEnds(in);
  return result;
}

// --- Checkpoints, as in scheduler_checkpoint.cc ----------------------------------------------------------------------

// Of blocks, as far as the record says them: the last one of each.
using BlockNames = std::unordered_map<BlockId, uint64_t>;

// What frames before a checkpoint have said for it.
struct Said {
  BlockNames names;
  std::unordered_map<RequestKey, std::string_view> requests;  // as they were written
};

void ReadBlockNames(Reader& in, BlockNames* names) {
  int64_t last = 0;
  while (!in.done()) {
    last += in.Small("the way to the next block");
    for (size_t left = in.Length(sizeof(uint64_t), "names"); left > 0; --left, ++last) {
      if (last < 0 || last > INT32_MAX) return in.Fail(StrCat("there is no block ", last));
      (*names)[static_cast<BlockId>(last)] = in.Fixed64("a block's name");
    }
  }
}

std::vector<BlockId> ReadBlocks(Reader& in) {
  std::vector<BlockId> blocks(in.Length(1, "blocks"));
  int64_t last = 0;
  for (BlockId& block : blocks) {
    last += in.Small("the way to the next block");
    if (last < 0 || last > INT32_MAX) in.Fail(StrCat("there is no block ", last));
    if (!in.ok()) return {};
    block = static_cast<BlockId>(last);
  }
  return blocks;
}

void ReadSaidRequest(Reader& in, Said* said) {
  const std::string_view request = in.Bytes(in.left(), "a request");
  said->requests[Reader(request).Number()] = request;
}

class CheckpointReader {
 public:
  CheckpointReader(Reader& in, const Said& said) : in_(in), said_(said) {}

  FlightCheckpoint Read() {
    checkpoint_.now = in_.Time("now");
    checkpoint_.step = in_.Number();
    checkpoint_.orders = in_.Number();
    if (in_.Flag("whether the step cost is learned")) ReadLearner();
    checkpoint_.floor = Level();
    checkpoint_.accounts.resize(in_.Length(3, "accounts"));
    for (FairShare::Service& service : checkpoint_.accounts) service = {Level(), Level(), Level()};
    checkpoint_.free_slots.resize(in_.Length(1, "free slots"));
    for (int32_t& slot : checkpoint_.free_slots) slot = in_.Count("a slot");
    ReadBits();
    checkpoint_.requests.resize(in_.Length(kLeastRequestBytes, "live requests"));
    for (FlightCheckpoint::Request& request : checkpoint_.requests) {
      in_.Flag("whether a request has been said") ? ReadSaidRequest(&request) : ReadRequest(&request);
    }
    checkpoint_.sharing.resize(in_.Length(1, "requests that share"));
    for (RequestKey& key : checkpoint_.sharing) key = in_.Number();
    if (in_.Flag("whether the head is blocked")) {
      checkpoint_.blocked = {
          .key = in_.Number(), .sequence = Index(), .until_available = in_.Count("blocks"), .until_step = in_.Number()};
    }
    if (in_.Flag("whether a step is in flight")) {
      checkpoint_.in_flight = ReadPlanned(in_);
      checkpoint_.retired = ReadBlocks(in_);
      if (checkpoint_.in_flight.empty()) in_.Fail("the step in flight is of no sequences");
    }
    checkpoint_.cancels.resize(in_.Length(2, "cancels"));
    for (FlightCancel& cancel : checkpoint_.cancels) cancel = ReadCancel(in_);
    checkpoint_.stops.resize(in_.Length(2, "stops"));
    for (FlightStop& stop : checkpoint_.stops) stop = ReadStop(in_);
    if (checkpoint_.whole) {
      SortBlocks();
    } else {
      std::erase_if(checkpoint_.requests,
                    [this](const auto& request) { return unknown_.contains(request.arrival.key); });
    }
    return std::move(checkpoint_);
  }

 private:
  static constexpr int64_t kMostLevel = int64_t{1} << 50;
  static constexpr int64_t kMostStart = int64_t{1} << 62;  // priorities that age move it by up to a century
  static constexpr size_t kLeastRequestBytes = 10;

  int64_t Level() {
    const int64_t level = in_.Signed();
    if (level < 0 || level > kMostLevel) in_.Fail(StrCat("an account's level is ", level));
    return in_.ok() ? level : 0;
  }
  uint32_t Index() { return static_cast<uint32_t>(in_.UpTo(UINT32_MAX, "the sequence")); }

  void ReadLearner() {
    StepCostLearner& learner = checkpoint_.learner.emplace(StepCost{});
    StepCostLearner::VisitNumbers(learner, [this](auto& number) {
      if constexpr (std::is_floating_point_v<std::remove_reference_t<decltype(number)>>) {
        number = std::bit_cast<double>(in_.Fixed64("what was learned"));
      } else {
        number = static_cast<std::remove_reference_t<decltype(number)>>(in_.Number());
      }
    });
    if (!learner.plausible()) in_.Fail("the step cost that was learned is none");
  }

  // Which blocks are published and which valued; of the cached ones, when they became that.
  void ReadBits() {
    const size_t words = in_.Length(2 * sizeof(uint64_t), "blocks");
    for (std::vector<uint64_t>* bits : {&kept_, &valued_}) {
      bits->resize(words);
      for (uint64_t& word : *bits) word = in_.Fixed64("blocks");
    }
    cached_at_.resize(in_.Length(sizeof(uint64_t), "cached blocks"));
    for (uint64_t& at : cached_at_) at = in_.Fixed64("when a block was cached");
  }
  static bool IsIn(const std::vector<uint64_t>& bits, BlockId block) {
    const auto word = static_cast<size_t>(block) / 64;
    return word < bits.size() && (bits[word] >> (block % 64) & 1) != 0;
  }

  // The held ones are those that somebody has, the cached ones the other published ones.
  void SortBlocks() {
    std::vector<BlockId> held = checkpoint_.retired;
    for (const FlightCheckpoint::Request& request : checkpoint_.requests) {
      held.insert(held.end(), request.shared.begin(), request.shared.end());
      for (const FlightCheckpoint::Sequence& sequence : request.sequences) {
        held.insert(held.end(), sequence.blocks.begin(), sequence.blocks.end());
      }
    }
    std::ranges::sort(held);
    held.erase(std::unique(held.begin(), held.end()), held.end());
    for (BlockId block : held) {
      auto& one = checkpoint_.held.emplace_back(FlightCheckpoint::Held{block, IsIn(valued_, block), std::nullopt});
      if (IsIn(kept_, block)) one.name = NameOf(block);
    }
    std::vector<std::pair<uint64_t, BlockId>> cached;
    for (size_t i = 0; i < kept_.size(); ++i) {
      for (uint64_t word = kept_[i]; word != 0; word &= word - 1) {
        const BlockId block = static_cast<BlockId>(64 * i) + std::countr_zero(word);
        if (std::ranges::binary_search(held, block)) continue;
        cached.emplace_back(cached.size() < cached_at_.size() ? cached_at_[cached.size()] : 0, block);
      }
    }
    if (cached.size() != cached_at_.size()) {
      in_.Fail(StrCat(cached.size(), " blocks are cached, and of ", cached_at_.size(), " it is said since when"));
    }
    std::ranges::sort(cached);
    for (const auto& [at, block] : cached) {
      (IsIn(valued_, block) ? checkpoint_.cached_valued : checkpoint_.cached).push_back(NameOf(block));
    }
  }

  // One that decodes: as it was said, and what has changed since.
  void ReadSaidRequest(FlightCheckpoint::Request* request) {
    const RequestKey key = in_.Number();
    size_t in_prompt = 0;
    if (const auto said = said_.requests.find(key); said != said_.requests.end()) {
      Reader in(said->second);
      CheckpointReader reader(in, said_);
      reader.all_kept_ = true;
      reader.ReadRequest(request);
      in_prompt = reader.in_prompt_;
      checkpoint_.whole &= reader.checkpoint_.whole;
      if (!in.ok()) return in_.Fail(StrCat("what was said of request ", key, ": ", in.error()));
      if (request->arrival.key != key || request->sequences.size() != 1) {
        return in_.Fail(StrCat("what was said of request ", key, " is not of one that decodes"));
      }
    } else {
      checkpoint_.whole = false;
      unknown_.insert(key);
      request->arrival.key = key;
      request->sequences.resize(1);
    }
    FlightCheckpoint::Sequence& sequence = request->sequences.front();
    for (int32_t* count : {&sequence.generated, &sequence.charged, &sequence.slot, &sequence.scheduled,
                           &sequence.computed, &sequence.published}) {
      *count = in_.Count("how far a sequence has come");
    }
    const std::vector<BlockId> blocks = ReadBlocks(in_);
    sequence.blocks.insert(sequence.blocks.end(), blocks.begin(), blocks.end());
    const size_t named = std::min(in_prompt + sequence.names.size(), sequence.blocks.size());
    const std::vector<uint64_t> names = ReadNames(std::span(sequence.blocks).subspan(named));
    sequence.names.insert(sequence.names.end(), names.begin(), names.end());
  }

  void ReadRequest(FlightCheckpoint::Request* request) {
    request->arrival = ReadArrival(in_);
    request->order = in_.Number();
    const uint64_t flags = in_.UpTo(3, "a request's flags");
    request->hurries = (flags & 2) != 0;
    request->admitted = (flags & 1) != 0;
    request->start_by = TimePoint(in_.Span("when to start", kMostStart));
    request->hopeless_before = in_.Span("when it is hopeless");
    if (request->hopeless_before < Duration(0)) in_.Fail("a prompt is said to take less than no time");
    request->scored = in_.Count("scored positions");
    request->leader = in_.Count("the leader") - 1;
    request->shared = ReadBlocks(in_);
    const auto sequences = static_cast<size_t>(request->arrival.num_sequences);
    if (sequences > in_.left()) in_.Fail(StrCat("there is no room for ", sequences, " sequences"));
    if (!in_.ok()) return;
    request->sequences.resize(sequences);
    in_prompt_ = static_cast<size_t>(in_.Count("full blocks of the prompt"));
    for (FlightCheckpoint::Sequence& sequence : request->sequences) ReadSequence(in_prompt_, &sequence);
    auto running = [](const auto& sequence) { return sequence.state == FlightCheckpoint::State::kRunning; };
    const auto it = std::ranges::find_if(request->sequences, running);
    request->names = ReadNames(it != request->sequences.end() ? it->blocks : request->shared);
  }

  void ReadSequence(size_t in_prompt, FlightCheckpoint::Sequence* sequence) {
    const uint64_t state = in_.UpTo(7, "a sequence's state");
    sequence->state = static_cast<FlightCheckpoint::State>(state >> 1);
    sequence->admitted = (state & 1) != 0;
    if (sequence->state == FlightCheckpoint::State::kEnded) return;
    for (int32_t* count : {&sequence->generated, &sequence->charged, &sequence->preempted}) {
      *count = in_.Count("what a sequence has had");
    }
    std::span<const BlockId> behind_prompt;
    if (sequence->state == FlightCheckpoint::State::kRunning) {
      for (int32_t* count : {&sequence->slot, &sequence->scheduled, &sequence->computed, &sequence->published}) {
        *count = in_.Count("how far a sequence has come");
      }
      sequence->blocks = ReadBlocks(in_);
      behind_prompt = std::span(sequence->blocks).subspan(std::min(in_prompt, sequence->blocks.size()));
    }
    sequence->names = ReadNames(behind_prompt);
  }

  std::vector<uint64_t> ReadNames(std::span<const BlockId> blocks) {
    const uint64_t count = in_.Number();
    if (count > blocks.size() + in_.left() / sizeof(uint64_t))
      in_.Fail(StrCat("there is no room for ", count, " names"));
    std::vector<uint64_t> names;
    while (in_.ok() && names.size() < count) {
      const uint64_t left = count - names.size();
      const uint64_t of_blocks = in_.UpTo(left, "how many names are those of blocks");
      for (uint64_t i = 0; i < of_blocks && in_.ok(); ++i) names.push_back(NameOf(blocks, names.size()));
      const uint64_t others = in_.UpTo(left - of_blocks, "how many names are no block's");
      for (uint64_t i = 0; i < others && in_.ok(); ++i) names.push_back(in_.Fixed64("a name"));
      if (of_blocks + others == 0) in_.Fail("names are missing");
    }
    return names;
  }

  uint64_t NameOf(std::span<const BlockId> blocks, size_t i) {
    if (i < blocks.size() && (all_kept_ || IsIn(kept_, blocks[i]))) return NameOf(blocks[i]);
    if (!checkpoint_.whole) return 0;  // of a request that is not known
    in_.Fail("a block has no name where one is said to be");
    return 0;
  }
  uint64_t NameOf(BlockId block) {
    const auto name = said_.names.find(block);
    if (name != said_.names.end()) return name->second;
    checkpoint_.whole = false;
    return 0;
  }

  Reader& in_;
  const Said& said_;
  size_t in_prompt_ = 0;                 // full blocks, of the request that was read last
  bool all_kept_ = false;                // a block that is said to have a name had one then
  std::vector<uint64_t> kept_, valued_;  // a bit for each block
  std::vector<uint64_t> cached_at_;      // of cached blocks, in their order
  std::unordered_set<RequestKey> unknown_;
  FlightCheckpoint checkpoint_;
};

// None: it only says something for the checkpoints behind it.
std::optional<FlightFrame> ReadFrame(Reader& in, Said* said) {
  const auto kind = static_cast<FlightKind>(in.UpTo(UINT8_MAX, "the kind"));
  switch (kind) {
    case FlightKind::kArrival:
      return ReadArrival(in);
    case FlightKind::kCancel:
      return ReadCancel(in);
    case FlightKind::kStop:
      return ReadStop(in);
    case FlightKind::kCacheReset:
      return FlightCacheReset{};
    case FlightKind::kAbort:
      return FlightAbort{in.Time("now")};
    case FlightKind::kNames:
      return ReadNames(in);
    case FlightKind::kPlan:
      return ReadPlan(in);
    case FlightKind::kResult:
      return ReadResult(in);
    case FlightKind::kCheckpoint:
      return CheckpointReader(in, *said).Read();
    case FlightKind::kBlockNames:
      ReadBlockNames(in, &said->names);
      return std::nullopt;
    case FlightKind::kSaidRequest:
      ReadSaidRequest(in, said);
      return std::nullopt;
  }
  in.Fail(StrCat("there is no kind ", static_cast<int>(kind)));
  return FlightCacheReset{};
}

}  // namespace

StatusOr<FlightRecord> ParseFlightRecord(std::string_view file) {
  if (!file.starts_with(kFlightMagic)) return InvalidArgument("is not a flight record: it does not begin with ALTIFLR");
  constexpr size_t kFixed = kFlightMagic.size() + sizeof kFlightVersion;
  if (file.size() < kFixed) return InvalidArgument("ends within its header");
  uint32_t version = 0;
  for (size_t i = 0; i < sizeof version; ++i) {
    version |= uint32_t{static_cast<uint8_t>(file[kFlightMagic.size() + i])} << (8 * i);
  }
  if (version != kFlightVersion) {
    return InvalidArgument(
        StrCat("is a flight record of version ", version, "; this program reads version ", kFlightVersion));
  }
  if (file.size() < kFixed + kDigestBytes) return InvalidArgument("ends within its header");
  const std::string_view body = file.substr(0, file.size() - kDigestBytes);
  Sha256 sha;
  sha.Update(body.data(), body.size());
  const Sha256Digest digest = sha.Finish();
  if (file.substr(body.size()) != std::string_view(reinterpret_cast<const char*>(digest.data()), digest.size())) {
    return InvalidArgument("is truncated or damaged: its checksum is not that of its contents");
  }

  Reader in(body.substr(kFixed));
  FlightRecord record;
  VisitFlightOptions(record.options, OptionReader{in});
  record.written_at_ns = in.Signed();
  record.written = in.Time("the time of writing");
  record.dropped_frames = in.Number();
  record.dropped_steps = in.Number();
  if (!in.ok()) return InvalidArgument(StrCat("has a bad header: ", in.error()));
  record.frame_bytes = in.left();
  Said said;
  while (!in.done()) {
    Reader frame(in.Bytes(in.Number(), "a frame"));
    if (!in.ok()) return InvalidArgument(StrCat("frame ", record.frames.size(), ": ", in.error()));
    std::optional<FlightFrame> read = ReadFrame(frame, &said);
    if (frame.ok() && !frame.done()) frame.Fail(StrCat(frame.left(), " bytes are left over"));
    if (!frame.ok()) return InvalidArgument(StrCat("frame ", record.frames.size(), ": ", frame.error()));
    if (read) record.frames.push_back(*std::move(read));
  }
  if (!in.ok()) return InvalidArgument(StrCat("frame ", record.frames.size(), ": ", in.error()));
  return record;
}

}  // namespace altiplano

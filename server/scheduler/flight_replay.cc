#include "server/scheduler/flight_replay.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>

#include "server/base/strings.h"
#include "server/scheduler/flight_recorder.h"
#include "server/scheduler/prefix_cache.h"

namespace altiplano {

namespace {

// Tokens are told apart by what they do only; blocks have their recorded names.
constexpr TokenId kAnyToken = 0, kEosToken = 1, kStopToken = 2;

// What a replay is ready to hold in memory.
constexpr int64_t kMostPoolTokens = int64_t{1} << 27;
constexpr int64_t kMostTokens = int64_t{1} << 30;  // of all prompts, and what a checkpoint has of answers
constexpr double kMostCost = 1e9;                  // microseconds, as in files of step costs
constexpr int32_t kMostRunning = 1 << 20, kMostBudget = 1 << 24, kMostSequences = 1 << 16;

class RecordedNames : public BlockNamer {
 public:
  void Add(const FlightNames& names) {
    std::unordered_map<int32_t, uint64_t>& known = names_[{names.key, names.sequence}];
    for (size_t i = 0; i < names.names.size(); ++i) {
      known[static_cast<int32_t>(static_cast<size_t>(names.first_block) + i)] = names.names[i];
    }
  }
  BlockHash Name(RequestKey request, uint32_t sequence, int32_t block) const override {
    BlockHash name{};
    if (auto it = names_.find({request, sequence}); it != names_.end()) {
      if (auto known = it->second.find(block); known != it->second.end()) {
        std::memcpy(name.data(), &known->second, sizeof known->second);
        return name;
      }
    }
    // Nobody had asked for it: its own, and no other's.
    std::memcpy(name.data(), &request, sizeof request);
    std::memcpy(name.data() + 8, &sequence, sizeof sequence);
    std::memcpy(name.data() + 12, &block, sizeof block);
    name.back() = 1;
    return name;
  }

 private:
  std::map<std::pair<RequestKey, uint32_t>, std::unordered_map<int32_t, uint64_t>> names_;
};

class Replay {
 public:
  explicit Replay(const FlightRecord& record) : record_(record) {}

  StatusOr<ReplayResult> Run() {
    RETURN_IF_ERROR(Prepare());
    for (at_ = begin_; at_ < record_.frames.size() && !parted_; ++at_) {
      Status status = std::visit([this](const auto& frame) { return Take(frame); }, record_.frames[at_]);
      if (!status.ok()) return InvalidArgument(StrCat("frame ", at_, ": ", status.message()));
    }
    ASSIGN_OR_RETURN(result_.difference, Compare());
    return result_;
  }

 private:
  Status Prepare() {
    const FlightCheckpoint* checkpoint = nullptr;
    if (record_.dropped_frames > 0) {
      ASSIGN_OR_RETURN(checkpoint, FindCheckpoint());
      result_.from = checkpoint->now;
    }
    SchedulerOptions options = record_.options;
    if (int64_t{options.num_blocks} * options.block_size > kMostPoolTokens || options.max_running > kMostRunning ||
        options.token_budget > kMostBudget) {
      return InvalidArgument(StrCat("the recorded scheduler is larger than a replay takes: ", options.num_blocks,
                                    " blocks of ", options.block_size, " tokens, ", options.max_running, " sequences, ",
                                    options.token_budget, " tokens in a step"));
    }
    const StepCost& cost = options.step_cost;
    for (double us :
         {cost.step_us, cost.weights_us, cost.token_us, cost.sequence_us, cost.kv_token_us, cost.attention_us}) {
      if (!(us >= 0 && us <= kMostCost))
        return InvalidArgument(StrCat("a recorded step cost is ", us, ", must be in [0, 1e9]"));
    }
    for (const FlightFrame& frame : record_.frames) {
      if (const auto* names = std::get_if<FlightNames>(&frame)) names_.Add(*names);
    }
    RETURN_IF_ERROR(CheckTokens(checkpoint));
    const size_t bytes = 2 * record_.frame_bytes + (1 << 20);
    recorder_ = std::make_unique<FlightRecorder>(options, bytes, FlightRecorder::kNoCheckpoints);
    options.eos_ids = {kEosToken};
    options.recorder = recorder_.get();
    options.namer = &names_;
    auto scheduler = Scheduler::Create(options);
    if (!scheduler.ok()) return InvalidArgument(StrCat("the recorded options: ", scheduler.status().message()));
    scheduler_ = std::move(*scheduler);
    return checkpoint == nullptr ? OkStatus() : Restore(options, *checkpoint);
  }

  Status CheckTokens(const FlightCheckpoint* checkpoint) const {
    int64_t tokens = 0;
    for (const FlightFrame& frame : record_.frames) {
      if (const auto* arrival = std::get_if<FlightArrival>(&frame)) tokens += arrival->prompt_tokens;
    }
    if (checkpoint != nullptr) {
      for (const FlightCheckpoint::Request& request : checkpoint->requests) {
        tokens += request.arrival.prompt_tokens;
        for (const FlightCheckpoint::Sequence& sequence : request.sequences) tokens += sequence.generated;
      }
    }
    if (tokens <= kMostTokens) return OkStatus();
    return InvalidArgument(StrCat("the recorded requests have ", tokens, " tokens, a replay takes ", kMostTokens));
  }

  // The first one: everything from there on can be replayed.
  StatusOr<const FlightCheckpoint*> FindCheckpoint() {
    for (size_t i = 0; i < record_.frames.size(); ++i) {
      const auto* checkpoint = std::get_if<FlightCheckpoint>(&record_.frames[i]);
      if (checkpoint == nullptr || !checkpoint->whole) continue;
      begin_ = i + 1;
      return checkpoint;
    }
    return Status(Code::kFailedPrecondition,
                  StrCat("the record does not begin with its scheduler, ", record_.dropped_steps,
                         " older steps have left the ring, and no checkpoint with all that it needs is in it: one "
                         "takes more than a quarter of --flight-record-memory"));
  }

  Status Restore(const SchedulerOptions& options, const FlightCheckpoint& checkpoint) {
    std::vector<std::shared_ptr<const Request>> requests;
    for (const FlightCheckpoint::Request& live : checkpoint.requests) {
      ASSIGN_OR_RETURN(requests.emplace_back(), Arrive(live.arrival));
    }
    std::shared_ptr<const StepPlan> in_flight;
    ASSIGN_OR_RETURN(scheduler_, Scheduler::Restore(options, checkpoint, requests, &in_flight));
    if (in_flight != nullptr) in_flight_.push_back(std::move(in_flight));
    return OkStatus();
  }

  Status Take(const FlightArrival& arrival) {
    ASSIGN_OR_RETURN(std::shared_ptr<const Request> request, Arrive(arrival));
    scheduler_->Add(arrival.key, std::move(request));
    return OkStatus();
  }
  StatusOr<std::shared_ptr<const Request>> Arrive(const FlightArrival& arrival) {
    ids_[arrival.key] = arrival.id;
    if (!seen_.emplace(arrival.key, true).second)
      return InvalidArgument(StrCat("request ", arrival.key, " arrives again"));
    if (arrival.prompt_tokens < 1 || arrival.prompt_tokens >= scheduler_->max_servable_tokens() ||
        arrival.num_sequences < 1 || arrival.num_sequences > kMostSequences || arrival.max_new_tokens < 1) {
      return InvalidArgument(StrCat("request ", arrival.key, " could not be served: ", arrival.prompt_tokens,
                                    " prompt tokens, ", arrival.num_sequences, " sequences, ", arrival.max_new_tokens,
                                    " new tokens at most"));
    }
    auto request = std::make_shared<Request>();
    request->id = arrival.id;
    request->tenant = arrival.tenant;
    request->prompt.assign(static_cast<size_t>(arrival.prompt_tokens), kAnyToken);
    request->num_sequences = arrival.num_sequences;
    request->stop.max_new_tokens = arrival.max_new_tokens;
    request->stop.token_ids = {kStopToken};
    request->priority = arrival.priority;
    request->bypass_prefix_cache = arrival.bypasses_cache;
    if (arrival.scores_prompt) request->sampling.prompt_top_logprobs = 0;
    request->arrival = arrival.arrival;
    request->queue_deadline = arrival.queue_deadline;
    request->deadline = arrival.deadline;
    request->time_limit = arrival.time_limit;
    request->ttft_target = arrival.ttft_target;
    return std::shared_ptr<const Request>(std::move(request));
  }
  Status Take(const FlightCancel& cancel) {
    scheduler_->Cancel(cancel.key, Status(cancel.code, "recorded"));
    return OkStatus();
  }
  Status Take(const FlightStop& stop) {
    scheduler_->StopSequence(stop.key, stop.sequence);
    return OkStatus();
  }
  Status Take(const FlightCacheReset&) {
    scheduler_->ResetPrefixCache();
    return OkStatus();
  }
  Status Take(const FlightAbort& abort) {
    in_flight_.clear();
    scheduler_->Abort(Status(Code::kUnavailable, "recorded"), abort.now, &events_);
    return OkStatus();
  }
  Status Take(const FlightNames&) { return OkStatus(); }
  Status Take(const FlightCheckpoint&) { return OkStatus(); }  // the replay knows its own state
  Status Take(const FlightPlan& recorded) {
    if (in_flight_.size() > 1) return InvalidArgument("a third plan before any result");
    std::shared_ptr<const StepPlan> plan = scheduler_->Plan(recorded.now, &events_);
    events_.clear();
    parted_ = (plan == nullptr) != (recorded.step == 0) ||
              (plan != nullptr && plan->sequences.size() != recorded.sequences.size());
    if (plan != nullptr) in_flight_.push_back(std::move(plan));
    return OkStatus();
  }
  Status Take(const FlightResult& recorded) {
    if (in_flight_.empty() || in_flight_.front()->step != recorded.step) {
      return InvalidArgument(StrCat("the result of step ", recorded.step, ", which is not the oldest in flight"));
    }
    const std::shared_ptr<const StepPlan> plan = std::move(in_flight_.front());
    in_flight_.pop_front();
    scheduler_->Apply(*plan, ResultOf(*plan, recorded), recorded.now, &events_);
    events_.clear();
    ++result_.steps;
    return OkStatus();
  }

  StepResult ResultOf(const StepPlan& plan, const FlightResult& recorded) const {
    std::map<std::pair<RequestKey, uint32_t>, TokenId> last;  // of those that EOS or a stop id ended
    for (const FlightEnd& end : recorded.ends) {
      if (!end.with_token) continue;
      if (end.finish == FinishReason::kEos) last[{end.key, end.sequence}] = kEosToken;
      if (end.finish == FinishReason::kStop) last[{end.key, end.sequence}] = kStopToken;
    }
    StepResult result;
    result.step = plan.step;
    result.device_time = recorded.device_time;
    for (size_t i = 0; i < plan.sequences.size(); ++i) {
      const PlannedSequence& planned = plan.sequences[i];
      const bool finite = std::ranges::find(recorded.non_finite, i) == recorded.non_finite.end();
      if (planned.num_prompt_scores > 0) {
        result.prompt_scores.emplace_back(static_cast<size_t>(planned.num_prompt_scores)).back().finite = finite;
      }
      if (!planned.sample) continue;
      TokenScore& score = result.sampled.emplace_back();
      const auto it = last.find({planned.request, planned.sequence});
      score.token = it == last.end() ? kAnyToken : it->second;
      score.finite = finite;
    }
    return result;
  }

  StatusOr<std::string> Compare() const {
    ASSIGN_OR_RETURN(FlightRecord again, ParseFlightRecord(recorder_->Write(record_.written, record_.written_at_ns)));
    // Names that nobody has needed yet stay with the recorder until the next plan.
    auto it = again.frames.begin();
    for (size_t i = begin_; i < std::min(at_, record_.frames.size()) && it != again.frames.end(); ++i) {
      if (std::holds_alternative<FlightCheckpoint>(record_.frames[i])) continue;
      if (record_.frames[i] != *it) return Describe(record_.frames[i], *it);
      ++it;
    }
    return std::string();
  }

  std::string NameOf(RequestKey key, uint32_t sequence) const {
    auto it = ids_.find(key);
    return StrCat("request ", it == ids_.end() || it->second.empty() ? StrCat("#", key) : it->second,
                  sequence == 0 ? "" : StrCat(" sequence ", sequence));
  }
  std::string Describe(const FlightPlanned& planned) const {
    return StrCat(NameOf(planned.key, planned.sequence), planned.admitted ? ", admitted" : "", " in slot ",
                  planned.slot, ", gets ", planned.num_tokens, " tokens from ", planned.first_position,
                  planned.sample ? " and samples" : "");
  }
  std::string Describe(const PlanNotes& notes) const {
    return StrCat(
        notes.waiting, " wait",
        notes.waiting > 0 ? StrCat(", ", NameOf(notes.head, notes.head_sequence), " first: ", WhyWaits(notes.why)) : "",
        "; ", notes.blocks_held, " blocks held, ", notes.blocks_cached, " cached");
  }
  // One thing of a list, or that it is not there.
  template <typename T, typename Words>
  std::string FirstOf(const char* what, const std::vector<T>& recorded, const std::vector<T>& again,
                      const Words& words) const {
    for (size_t i = 0; i < std::max(recorded.size(), again.size()); ++i) {
      if (i < recorded.size() && i < again.size() && recorded[i] == again[i]) continue;
      auto at = [&](const std::vector<T>& list) { return i < list.size() ? words(list[i]) : StrCat("no more ", what); };
      return StrCat("recorded: ", at(recorded), "; replayed: ", at(again));
    }
    return "";
  }
  std::string DescribeEnds(const std::vector<FlightEnd>& recorded, const std::vector<FlightEnd>& again) const {
    return FirstOf("ends", recorded, again, [this](const FlightEnd& end) {
      return end.sequence == FlightEnd::kRequest
                 ? StrCat(NameOf(end.key, 0), " ends with ", CodeName(end.code))
                 : StrCat(NameOf(end.key, end.sequence), " finishes, reason ", static_cast<int>(end.finish));
    });
  }
  std::string Describe(const FlightFrame& recorded, const FlightFrame& again) const {
    if (recorded.index() != again.index()) return StrCat("frame ", at_, " is of another kind");
    if (const auto* plan = std::get_if<FlightPlan>(&recorded)) {
      const FlightPlan& other = std::get<FlightPlan>(again);
      std::string what = DescribeEnds(plan->ends, other.ends);
      auto preempted = [this](const FlightPreempted& one) {
        return StrCat(NameOf(one.key, one.sequence), " is preempted");
      };
      if (what.empty()) what = FirstOf("preemptions", plan->preempted, other.preempted, preempted);
      auto planned = [this](const FlightPlanned& one) { return Describe(one); };
      if (what.empty()) what = FirstOf("sequences", plan->sequences, other.sequences, planned);
      if (what.empty()) what = StrCat("recorded: ", Describe(plan->notes), "; replayed: ", Describe(other.notes));
      return StrCat("plan of step ", std::max(plan->step, other.step), ": ", what);
    }
    if (const auto* result = std::get_if<FlightResult>(&recorded)) {
      return StrCat("result of step ", result->step, ": ",
                    DescribeEnds(result->ends, std::get<FlightResult>(again).ends));
    }
    if (const auto* names = std::get_if<FlightNames>(&recorded)) {
      return StrCat("other blocks were looked up or filled, from block ", names->first_block, " of ",
                    NameOf(names->key, 0), " on");
    }
    return "what went in is not what came back out of the record";
  }

  const FlightRecord& record_;
  RecordedNames names_;
  std::unique_ptr<FlightRecorder> recorder_;  // of the replay
  std::unique_ptr<Scheduler> scheduler_;
  std::deque<std::shared_ptr<const StepPlan>> in_flight_;
  std::vector<Event> events_;
  std::unordered_map<RequestKey, bool> seen_;
  std::unordered_map<RequestKey, std::string> ids_;
  size_t begin_ = 0;     // of the frames, the first that is replayed
  size_t at_ = 0;        // of the frames
  bool parted_ = false;  // plans are of different sequences: going on would compare nothing
  ReplayResult result_;
};

}  // namespace

StatusOr<ReplayResult> ReplayFlightRecord(const FlightRecord& record) {
  return Replay(record).Run();
}

std::string_view WhyWaits(PlanNotes::Why why) {
  switch (why) {
    case PlanNotes::Why::kNobodyWaits:
      return "nobody waits";
    case PlanNotes::Why::kNoSlot:
      return "no slot";
    case PlanNotes::Why::kNoBlocks:
      return "no blocks";
    case PlanNotes::Why::kRunningFirst:
      return "running sequences need blocks first";
    case PlanNotes::Why::kBudget:
      return "no tokens left in the step";
    case PlanNotes::Why::kCeiling:
      return "no room under max-itl";
    case PlanNotes::Why::kTenant:
      return "its tenant runs as many as it may";
  }
  return "";
}

}  // namespace altiplano

#include "server/frontend/generate_call.h"

#include <algorithm>
#include <utility>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/frontend/error_mapping.h"
#include "server/frontend/proto_mapping.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

// Engine thread: only appends to the egress queue.
class Sink : public RequestSink {
 public:
  Sink(CallKey key, std::shared_ptr<EgressQueue> queue, std::shared_ptr<LiveCounters> live)
      : key_(key), queue_(std::move(queue)), live_(std::move(live)) {
    ++live_->sinks;
  }
  ~Sink() override { --live_->sinks; }
  void OnEvent(Event event) override { queue_->PostEvent(key_, std::move(event)); }

 private:
  const CallKey key_;
  const std::shared_ptr<EgressQueue> queue_;
  const std::shared_ptr<LiveCounters> live_;
};

std::string_view FinishName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kTimeLimit:
      return "time_limit";
    case FinishReason::kToolCall:
      return "tool_call";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "";
}

}  // namespace

GenerateCall::GenerateCall(CallKey key, FrontendState* state, InferenceEngine* engine)
    : key_(key), state_(state), engine_(engine), arrival_(Clock::Real().Now()) {
  ++state_->live->calls;
}

GenerateCall::~GenerateCall() {
  --state_->live->calls;
}

void GenerateCall::OnNotice(Notice notice, TimePoint now) {
  if (auto* event = std::get_if<Event>(&notice)) {
    OnEvent(std::move(*event), now);
  } else if (auto* prepared = std::get_if<Prepared>(&notice)) {
    OnPrepared(std::move(*prepared));
  } else if (auto* done = std::get_if<WriteDone>(&notice)) {
    OnWriteDone(done->ok);
  } else if (std::holds_alternative<ClientGone>(notice)) {
    End(WhyGone(now), /*deliver=*/false);
  } else if (auto* killed = std::get_if<Killed>(&notice)) {
    End(std::move(killed->why), /*deliver=*/true);
  }
}

// gRPC reports a passed deadline as a cancel.
Status GenerateCall::WhyGone(TimePoint now) const {
  if (request_ == nullptr || now < request_->request->deadline) {
    return Status(Code::kCancelled, "the client cancelled the call or went away");
  }
  ErrorDetail detail;
  detail.reason = "DEADLINE";
  return Status(Code::kDeadlineExceeded, "the client's deadline has passed", std::move(detail));
}

void GenerateCall::OnPrepared(Prepared prepared) {
  request_id_ = std::move(prepared.request_id);
  const Status& status = prepared.request.status();
  phase_ = Phase::kSubmitted;
  if (!abort_.ok()) return End(std::move(abort_), abort_delivers_);
  if (!status.ok()) return End(status, true);
  request_ = std::make_shared<const PreparedRequest>(std::move(*prepared.request));
  tokenizer_ = std::move(prepared.tokenizer);
  auto count = static_cast<uint32_t>(request_->request->num_sequences);
  sequences_.reserve(count);
  for (uint32_t i = 0; i < count; ++i) sequences_.emplace_back(i, *request_, tokenizer_);
  if (engine_ == nullptr) return;
  auto sink = std::make_shared<Sink>(key_, state_->egress.queue(), state_->live);
  auto handle = engine_->Submit(request_->request, std::move(sink));
  if (!handle.ok()) return End(handle.status(), true);
  handle_ = std::move(*handle);
}

void GenerateCall::OnEvent(Event event, TimePoint now) {
  if (phase_ != Phase::kSubmitted) return;
  switch (event.kind) {
    case Event::Kind::kAdmitted:
      admitted_ = true;
      cached_tokens_ = event.cached_tokens;
      timing_.queued = event.timing.queued;
      if (Duration limit = request_->time_limit; limit > Duration(0) && limit < kNever - now) {
        time_limit_at_ = now + limit;
      }
      break;
    case Event::Kind::kPromptScores:
      for (TokenScore& score : event.prompt_scores) {
        size_t position = prompt_scores_.size() + 1;
        if (position < request_->request->prompt.size()) score.token = request_->request->prompt[position];
        prompt_scores_.push_back(std::move(score));
      }
      break;
    case Event::Kind::kToken:
      OnToken(event, now);
      break;
    case Event::Kind::kFinished:
      sequences_.at(event.sequence).OnFinished(event.finish, event.stop_token);
      break;
    case Event::Kind::kEnded:
      EndAsEngineSays(std::move(event));
      break;
  }
}

void GenerateCall::OnToken(const Event& event, TimePoint now) {
  // The log's, if the call is cut off; kEnded brings the engine's own time.
  if (timing_.first_token == Duration(0)) timing_.first_token = now - arrival_;
  SequenceOutput& sequence = sequences_.at(event.sequence);
  if (sequence.OnToken(event.score, event.finish, event.stop_token)) handle_.StopSequence(event.sequence);
}

bool GenerateCall::AllFinished() const {
  return std::all_of(sequences_.begin(), sequences_.end(), [](const SequenceOutput& s) { return s.finished(); });
}

void GenerateCall::EndAsEngineSays(Event event) {
  timing_ = event.timing;
  if (event.status.ok()) {
    for (SequenceOutput& sequence : sequences_) sequence.OnFinished(FinishReason::kCancelled, -1);
  }
  // A whole answer is one, whatever happened after its last token.
  End(AllFinished() ? OkStatus() : std::move(event.status), true);
}

void GenerateCall::End(Status status, bool deliver) {
  if (phase_ == Phase::kFinished) return;
  if (phase_ == Phase::kPreparing) {
    // The text pool still works on it; its answer ends the call.
    if (abort_.ok()) abort_ = std::move(status);
    abort_delivers_ = abort_delivers_ && deliver;
    return;
  }
  deliver_ = deliver_ && deliver;
  handle_ = RequestHandle();  // cancels what the engine still has
  time_limit_at_ = kNever;
  // The first reason stands, but an answer that cannot be delivered was not a success.
  if (phase_ == Phase::kEnding && (deliver || !status_.ok())) return;
  phase_ = Phase::kEnding;
  if (status.code() == Code::kInternal) {
    // The error id leads an operator from a client's report to the log.
    ErrorDetail detail = status.detail() != nullptr ? *status.detail() : ErrorDetail{};
    if (!detail.reason.empty() && detail.reason != "ENGINE_FAULT") detail.metadata["cause"] = detail.reason;
    detail.reason = "ENGINE_FAULT";
    detail.metadata["error_id"] = StrCat(key_);
    status = Status(status.code(), status.message(), std::move(detail));
  }
  status_ = std::move(status);
}

void GenerateCall::ApplyTimers(TimePoint now) {
  if (now >= time_limit_at_) {
    time_limit_at_ = kNever;
    for (uint32_t i = 0; i < sequences_.size(); ++i) {
      if (sequences_[i].finished()) continue;
      sequences_[i].OnFinished(FinishReason::kTimeLimit, -1);
      handle_.StopSequence(i);
    }
  }
  if (now >= give_up_at_) {
    give_up_at_ = kNever;
    CancelTransport();
  }
}

TimePoint GenerateCall::next_timer() const {
  return std::min({time_limit_at_, give_up_at_, TransportTimer()});
}

void GenerateCall::MarkFinished(TimePoint now) {
  phase_ = Phase::kFinished;
  give_up_at_ = now + limits().max_unread_time;
  state_->registry.Remove(request_id_, key_);
  LogEnd(now);
  prompt_scores_ = {};
  state_->Leave();
}

void GenerateCall::LogEnd(TimePoint now) const {
  std::string finish;
  uint32_t tokens = 0;
  for (const SequenceOutput& sequence : sequences_) {
    tokens += sequence.tokens();
    if (!finish.empty()) finish += ',';
    finish += FinishName(sequence.finish());
  }
  size_t prompt_tokens = request_ != nullptr ? request_->request->prompt.size() : 0;
  Duration total = timing_.total > Duration(0) ? timing_.total : now - arrival_;
  log::Info("request finished", {{"request_id", request_id_},
                                 {"status", CodeName(status_.code())},
                                 {"reason", ReasonOf(status_)},
                                 {"prompt_tokens", prompt_tokens},
                                 {"cached_tokens", cached_tokens_},
                                 {"completion_tokens", tokens},
                                 {"queued_ms", Milliseconds(timing_.queued)},
                                 {"ttft_ms", Milliseconds(timing_.first_token)},
                                 {"total_ms", Milliseconds(total)},
                                 {"finish", finish}});
  if (status_.code() == Code::kInternal) {
    log::Error("request failed", {{"request_id", request_id_}, {"error_id", key_}, {"error", status_.message()}});
  }
}

void GenerateCall::TakePromptScores(size_t count, google::protobuf::RepeatedPtrField<v1::TokenLogprob>* out) {
  count = std::min(count, prompt_scores_left());
  for (size_t i = 0; i < count; ++i) ScoreToProto(prompt_scores_[prompt_scores_taken_ + i], *tokenizer_, out->Add());
  prompt_scores_taken_ += count;
}

void GenerateCall::FillPrompt(v1::Prompt* out) const {
  out->set_request_id(request_id_);
  out->set_tokens(static_cast<uint32_t>(request_->request->prompt.size()));
  out->set_cached_tokens(cached_tokens_);
  out->set_seed(request_->request->sampling.seed);
}

void GenerateCall::FillUsage(v1::Usage* out) const {
  uint32_t tokens = 0;
  for (const SequenceOutput& sequence : sequences_) tokens += sequence.tokens();
  out->set_prompt_tokens(static_cast<uint32_t>(request_->request->prompt.size()));
  out->set_cached_tokens(cached_tokens_);
  out->set_completion_tokens(tokens);
}

void GenerateCall::FillTiming(v1::Timing* out) const {
  *out->mutable_queued() = DurationToProto(timing_.queued);
  *out->mutable_first_token() = DurationToProto(timing_.first_token);
  *out->mutable_total() = DurationToProto(timing_.total);
  out->set_preemptions(timing_.preemptions);
}

}  // namespace altiplano

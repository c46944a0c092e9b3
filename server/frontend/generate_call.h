// GenerateCall: one generation from arrival to its end, whichever way its answer travels. StreamCall and UnaryCall add
// the way. All on the egress thread.
//
//   preparing --Prepared--> submitted --kEnded, cancel, kill--> ending --Finish--> finished
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "altiplano/inference/v1/inference.pb.h"
#include "server/engine/engine.h"
#include "server/frontend/egress.h"
#include "server/frontend/frontend_state.h"
#include "server/frontend/prepare.h"
#include "server/frontend/sequence_output.h"

namespace altiplano {

class GenerateCall : public EgressCall {
 public:
  // engine null: nothing is submitted (tests feed the events).
  GenerateCall(CallKey key, FrontendState* state, InferenceEngine* engine);
  ~GenerateCall() override;

  void OnNotice(Notice notice, TimePoint now) override;
  TimePoint next_timer() const override;

 protected:
  enum class Phase { kPreparing, kSubmitted, kEnding, kFinished };

  // The way of the answer.
  virtual void OnWriteDone(bool /*ok*/) {}
  virtual TimePoint TransportTimer() const = 0;
  virtual void CancelTransport() = 0;  // the status cannot be delivered: reset the stream

  Phase phase() const { return phase_; }
  const Status& status() const { return status_; }  // of a call that is ending
  bool delivers() const { return deliver_; }        // false: the client is gone or does not read
  bool admitted() const { return admitted_; }
  const PreparedRequest& request() const { return *request_; }
  std::vector<SequenceOutput>& sequences() { return sequences_; }
  // Scores of the prompt not yet taken; moves at most `count` of them.
  size_t prompt_scores_left() const { return prompt_scores_.size() - prompt_scores_taken_; }
  void TakePromptScores(size_t count, google::protobuf::RepeatedPtrField<inference::v1::TokenLogprob>* out);
  void FillPrompt(inference::v1::Prompt* out) const;
  void FillUsage(inference::v1::Usage* out) const;
  void FillTiming(inference::v1::Timing* out) const;

  // Ends the call; what is pending is still sent when `deliver`.
  void End(Status status, bool deliver);
  // Right before the transport's Finish: the id is free, the call is not live, its line is logged.
  void MarkFinished(TimePoint now);
  void ApplyTimers(TimePoint now);

  const FrontendLimits& limits() const { return state_->options.limits; }

 private:
  void OnPrepared(Prepared prepared);
  Status WhyGone(TimePoint now) const;
  void OnEvent(Event event, TimePoint now);
  void OnToken(const Event& event, TimePoint now);
  void EndAsEngineSays(Event event);
  bool AllFinished() const;
  void LogEnd(TimePoint now) const;

  const CallKey key_;
  FrontendState* const state_;
  InferenceEngine* const engine_;
  const TimePoint arrival_;

  Phase phase_ = Phase::kPreparing;
  Status status_;
  bool deliver_ = true;
  Status abort_;  // not OK: what happened while the request was being prepared
  bool abort_delivers_ = true;
  bool admitted_ = false;

  std::string request_id_;
  std::shared_ptr<const PreparedRequest> request_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  RequestHandle handle_;
  std::vector<SequenceOutput> sequences_;
  std::vector<TokenScore> prompt_scores_;
  size_t prompt_scores_taken_ = 0;
  uint32_t cached_tokens_ = 0;
  RequestTiming timing_;

  TimePoint time_limit_at_ = kNever;
  TimePoint give_up_at_ = kNever;  // finished, but gRPC is not through: reset the stream then
};

}  // namespace altiplano

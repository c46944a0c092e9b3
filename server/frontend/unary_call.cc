#include "server/frontend/unary_call.h"

namespace altiplano {

void UnaryCall::Flush(TimePoint now) {
  ApplyTimers(now);
  if (phase() != Phase::kEnding) return;
  inference::v1::GenerateResponse response;
  if (status().ok() && delivers()) {
    FillPrompt(response.mutable_prompt());
    TakePromptScores(prompt_scores_left(), response.mutable_prompt()->mutable_logprobs());
    for (SequenceOutput& sequence : sequences()) sequence.TakeAll(response.add_sequences());
    FillUsage(response.mutable_usage());
    FillTiming(response.mutable_timing());
  }
  MarkFinished(now);
  transport_->Finish(status(), response);
}

}  // namespace altiplano

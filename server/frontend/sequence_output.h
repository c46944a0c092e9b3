// SequenceOutput: one sequence's tokens become text, deltas and a finish. Egress thread.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "altiplano/inference/v1/inference.pb.h"
#include "server/frontend/prepare.h"
#include "server/scheduler/step_plan.h"
#include "server/text/incremental_decoder.h"
#include "server/text/stop_matcher.h"
#include "server/text/tokenizer.h"

namespace altiplano {

class SequenceOutput {
 public:
  // `options` must outlive this.
  SequenceOutput(uint32_t index, const PreparedRequest& options, std::shared_ptr<const Tokenizer> tokenizer);

  // Takes a token that the engine sampled; finish != kNone with the sequence's last one, stop_token the id that ended
  // it. True when it completed a stop string: the engine does not know, tell it. After the finish tokens are ignored:
  // they are neither sent nor counted.
  bool OnToken(const TokenScore& score, FinishReason finish, TokenId stop_token);
  // It ended without a further token.
  void OnFinished(FinishReason finish, TokenId stop_token);

  bool finished() const { return finish_ != FinishReason::kNone; }
  FinishReason finish() const { return finish_; }
  uint32_t tokens() const { return tokens_; }

  // Something a client would see: text, ids, scores, the finish.
  bool due() const;
  // About what the pending part of the output occupies. The echoed prompt is bounded by itself and does not count.
  int64_t pending_bytes() const { return pending_bytes_; }
  // Moves up to about a quarter of a MiB of echo, or all that is pending, to `delta`.
  void Take(inference::v1::Delta* delta);
  // All of it.
  void TakeAll(inference::v1::Sequence* sequence);

 private:
  void AppendText(std::string text);
  void Finish(FinishReason finish, TokenId stop_token);
  bool ScoresWanted() const { return options_.request->sampling.top_logprobs >= 0; }
  void FillFinish(inference::v1::Finish* out) const;

  const uint32_t index_;
  const PreparedRequest& options_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const bool decodes_;  // someone reads the text: the client, the stop matcher or the parser of tool calls
  IncrementalDecoder decoder_;
  IncrementalDecoder raw_decoder_;  // with special tokens' names, for tool calls
  StopMatcher matcher_;

  uint32_t tokens_ = 0;
  FinishReason finish_ = FinishReason::kNone;
  TokenId stop_token_ = -1;
  std::vector<ToolCall> tool_calls_;
  std::string answer_;  // raw text so far; empty unless tools are offered

  size_t echoed_ = 0;  // bytes of options_.echo that have been taken
  inference::v1::Delta pending_;
  int64_t pending_bytes_ = 0;
  bool finish_taken_ = false;
};

}  // namespace altiplano

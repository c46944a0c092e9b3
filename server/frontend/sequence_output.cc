#include "server/frontend/sequence_output.h"

#include <algorithm>
#include <utility>

#include "server/frontend/proto_mapping.h"
#include "server/text/tool_calls.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

constexpr size_t kEchoBytes = 256 << 10;
constexpr int64_t kBytesPerId = 5;
constexpr int64_t kBytesPerScore = 24;

}  // namespace

SequenceOutput::SequenceOutput(uint32_t index, const PreparedRequest& options,
                               std::shared_ptr<const Tokenizer> tokenizer)
    : index_(index),
      options_(options),
      tokenizer_(std::move(tokenizer)),
      decodes_(options.text || !options.stop_strings.empty()),
      decoder_(tokenizer_, options.keep_special_tokens),
      raw_decoder_(tokenizer_, /*keep_special=*/true),
      matcher_(options.stop_strings, options.include_stop) {}

bool SequenceOutput::OnToken(const TokenScore& score, FinishReason finish, TokenId stop_token) {
  if (finished()) return false;
  ++tokens_;
  pending_.set_num_tokens(pending_.num_tokens() + 1);
  if (options_.token_ids) {
    pending_.add_token_ids(static_cast<uint32_t>(score.token));
    pending_bytes_ += kBytesPerId;
  }
  if (ScoresWanted()) {
    ScoreToProto(score, *tokenizer_, pending_.add_logprobs());
    pending_bytes_ += kBytesPerScore * static_cast<int64_t>(1 + score.top.size());
  }
  if (options_.tools) answer_ += raw_decoder_.Push(score.token);
  // A token that ended the sequence is not part of the text, unless asked for.
  bool shown = stop_token < 0 || options_.include_stop;
  if (decodes_ && shown) AppendText(decoder_.Push(score.token));
  bool matched = matcher_.matched() >= 0;
  if (matched) {
    Finish(FinishReason::kStop, -1);
  } else if (finish != FinishReason::kNone) {
    Finish(finish, stop_token);
  }
  return matched && finish == FinishReason::kNone;
}

void SequenceOutput::OnFinished(FinishReason finish, TokenId stop_token) {
  if (!finished()) Finish(finish, stop_token);
}

void SequenceOutput::AppendText(std::string text) {
  std::string certain = matcher_.Push(text);
  if (!options_.text) return;
  pending_bytes_ += static_cast<int64_t>(certain.size());
  pending_.mutable_text()->append(certain);
}

void SequenceOutput::Finish(FinishReason finish, TokenId stop_token) {
  finish_ = finish;
  stop_token_ = stop_token;
  if (decodes_ && matcher_.matched() < 0) {
    AppendText(decoder_.Flush());  // U+FFFD may complete a stop string too
    if (matcher_.matched() >= 0) {
      finish_ = FinishReason::kStop;
      stop_token_ = -1;
    } else if (options_.text) {
      pending_.mutable_text()->append(matcher_.Flush());
    }
  }
  if (!options_.tools) return;
  answer_ += raw_decoder_.Flush();
  if (finish_ == FinishReason::kEos || finish_ == FinishReason::kStop) {
    tool_calls_ = ParseToolCalls(answer_, options_.tool_dialect, options_.tool_names);
    if (!tool_calls_.empty()) finish_ = FinishReason::kToolCall;
  }
  answer_.clear();
}

bool SequenceOutput::due() const {
  if (echoed_ < options_.echo.size() || (finished() && !finish_taken_)) return true;
  if (!pending_.text().empty()) return true;
  bool counted_alone = !options_.text && !options_.token_ids && !ScoresWanted();
  return pending_.token_ids_size() > 0 || pending_.logprobs_size() > 0 || (counted_alone && pending_.num_tokens() > 0);
}

void SequenceOutput::FillFinish(v1::Finish* out) const {
  out->set_reason(FinishToProto(finish_));
  out->set_tokens(tokens_);
  if (matcher_.matched() >= 0) {
    out->set_stop_sequence(matcher_.stop(matcher_.matched()));
  } else if (stop_token_ >= 0) {
    out->set_stop_token_id(static_cast<uint32_t>(stop_token_));
  }
  for (const ToolCall& call : tool_calls_) {
    v1::ToolCall* entry = out->add_tool_calls();
    entry->set_id(call.id);
    entry->set_name(call.name);
    entry->set_arguments_json(call.arguments_json);
  }
}

void SequenceOutput::Take(v1::Delta* delta) {
  size_t echo_left = options_.echo.size() - echoed_;
  if (echo_left > 0) {
    size_t take = std::min(echo_left, kEchoBytes);
    // Whole code points only.
    while (take < echo_left && (static_cast<unsigned char>(options_.echo[echoed_ + take]) & 0xC0) == 0x80) --take;
    delta->set_index(index_);
    delta->set_text(options_.echo.substr(echoed_, take));
    echoed_ += take;
    return;
  }
  delta->Swap(&pending_);
  pending_.Clear();
  pending_bytes_ = 0;
  delta->set_index(index_);
  if (finished() && !finish_taken_) {
    finish_taken_ = true;
    FillFinish(delta->mutable_finish());
  }
}

void SequenceOutput::TakeAll(v1::Sequence* sequence) {
  sequence->set_index(index_);
  sequence->set_text(options_.echo);
  echoed_ = options_.echo.size();
  v1::Delta delta;
  Take(&delta);
  sequence->mutable_text()->append(delta.text());
  sequence->mutable_token_ids()->Swap(delta.mutable_token_ids());
  sequence->mutable_logprobs()->Swap(delta.mutable_logprobs());
  *sequence->mutable_finish() = std::move(*delta.mutable_finish());
}

}  // namespace altiplano

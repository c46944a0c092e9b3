#include "server/frontend/stream_call.h"

#include <algorithm>

#include "server/base/strings.h"

namespace altiplano {

namespace {

// A message stays far below the 4 MiB that clients take by default.
constexpr int64_t kMessageBytes = 256 << 10;
// Held back by min_flush_interval no longer when it is this much.
constexpr int64_t kFlushBytes = 64 << 10;
constexpr int64_t kBytesPerScore = 24;

Status SlowReader(int64_t bytes, Duration waited) {
  ErrorDetail detail;
  detail.reason = "SLOW_READER";
  detail.metadata = {{"unread_bytes", StrCat(bytes)}, {"unread_ms", StrCat(waited / std::chrono::milliseconds(1))}};
  return Status(Code::kResourceExhausted, "the client does not read its stream fast enough", std::move(detail));
}

}  // namespace

void StreamCall::Flush(TimePoint now) {
  ApplyTimers(now);
  if (phase() == Phase::kFinished) return;
  if (in_flight_ && TooSlow(now)) End(SlowReader(PendingBytes(), now - write_started_), /*deliver=*/false);
  if (phase() == Phase::kEnding && !delivers()) {
    MarkFinished(now);
    transport_->Finish(status());
    return;
  }
  waits_ = false;
  if (in_flight_) return;
  if (FillNext(now)) {
    message_.set_sequence_number(sequence_number_++);
    in_flight_ = true;
    write_started_ = now;
    transport_->Write(message_);
  } else if (phase() == Phase::kEnding) {
    Complete(now);
  }
}

void StreamCall::OnWriteDone(bool ok) {
  in_flight_ = false;
  if (!ok) End(Status(Code::kCancelled, "the client went away"), /*deliver=*/false);
}

TimePoint StreamCall::TransportTimer() const {
  if (phase() == Phase::kFinished) return kNever;
  if (in_flight_) return write_started_ + limits().max_unread_time;
  return waits_ ? next_deltas_ : kNever;
}

bool StreamCall::TooSlow(TimePoint now) {
  return PendingBytes() > limits().max_unread_bytes || now - write_started_ >= limits().max_unread_time;
}

int64_t StreamCall::PendingBytes() {
  int64_t bytes = 0;
  for (const SequenceOutput& sequence : sequences()) bytes += sequence.pending_bytes();
  return bytes;
}

bool StreamCall::AnythingDue() {
  return std::any_of(sequences().begin(), sequences().end(), [](const SequenceOutput& s) { return s.due(); });
}

bool StreamCall::FillNext(TimePoint now) {
  if (!admitted()) return false;  // a refusal is trailers only
  message_.Clear();
  if (!started_ || prompt_scores_left() > 0) {
    FillStarted();
    return true;
  }
  return FillDeltas(now);
}

// The first at admission. Log-probabilities of a long prompt come later and would exceed what clients take: they follow
// in further `started` messages, each with the next of them, before the first deltas.
void StreamCall::FillStarted() {
  started_ = true;
  inference::v1::Prompt* prompt = message_.mutable_started();
  FillPrompt(prompt);
  int64_t bytes = kBytesPerScore * (1 + std::max(0, request().request->sampling.prompt_top_logprobs));
  TakePromptScores(static_cast<size_t>(std::max<int64_t>(1, kMessageBytes / bytes)), prompt->mutable_logprobs());
}

bool StreamCall::FillDeltas(TimePoint now) {
  if (!AnythingDue()) return false;
  bool may_wait = phase() == Phase::kSubmitted && PendingBytes() < kFlushBytes;
  if (may_wait && now < next_deltas_) {
    waits_ = true;
    return false;
  }
  int64_t bytes = 0;
  for (SequenceOutput& sequence : sequences()) {
    if (!sequence.due()) continue;
    if (bytes >= kMessageBytes) break;
    bytes += sequence.pending_bytes();
    inference::v1::Delta* delta = message_.mutable_deltas()->add_items();
    sequence.Take(delta);
    bytes += static_cast<int64_t>(delta->text().size());
  }
  Duration interval = request().min_flush_interval;
  next_deltas_ = interval < kNever - now ? now + interval : kNever;
  return true;
}

void StreamCall::Complete(TimePoint now) {
  MarkFinished(now);
  if (!status().ok()) {
    transport_->Finish(status());
    return;
  }
  message_.Clear();
  message_.set_sequence_number(sequence_number_++);
  FillUsage(message_.mutable_completed()->mutable_usage());
  FillTiming(message_.mutable_completed()->mutable_timing());
  transport_->WriteAndFinish(message_);
}

}  // namespace altiplano

// The native API's messages to and from the front end's own types. Judges nothing.
#pragma once

#include "altiplano/inference/v1/inference.pb.h"
#include "server/frontend/generate_input.h"
#include "server/scheduler/step_plan.h"
#include "server/text/tokenizer.h"

namespace altiplano {

// Takes the strings out of the message.
GenerateInput InputFromProto(inference::v1::GenerateRequest&& request);
ChatInput ChatFromProto(inference::v1::ChatPrompt&& chat);
DurationInput DurationFromProto(const google::protobuf::Duration& duration);

google::protobuf::Duration DurationToProto(Duration duration);
inference::v1::FinishReason FinishToProto(FinishReason reason);
void ScoreToProto(const TokenScore& score, const Tokenizer& tokenizer, inference::v1::TokenLogprob* out);

}  // namespace altiplano

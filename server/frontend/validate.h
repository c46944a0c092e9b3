// The validator: the one place that says which generations are legal, for every protocol that ends in a GenerateInput.
#pragma once

#include <string_view>

#include "server/base/status.h"
#include "server/frontend/generate_input.h"
#include "server/frontend/limits.h"
#include "server/frontend/server.h"

namespace altiplano {

// All that can be judged before the text is tokenized; the rules that need the prompt's length are in prepare.h.
//   INVALID_ARGUMENT with every field that is wrong (dotted paths of GenerateRequest), NOT_FOUND MODEL_NOT_FOUND,
//   UNIMPLEMENTED FEATURE (constraints, forced tool choice), FAILED_PRECONDITION for a chat without a chat format.
// Fields in error messages are counted and measured, never quoted: prompts stay out of logs.
Status ValidateInput(const GenerateInput& input, const ServedModel& model, const FrontendLimits& limits);

// The same rules where a chat alone is given (Tokenize). `prefix`: the chat's field, "chat".
Status ValidateChat(const ChatInput& chat, std::string_view prefix, const ServedModel& model,
                    const FrontendLimits& limits);

// Whether a client may choose this id: not empty, short enough, of visible ASCII.
bool IsRequestId(std::string_view text, const FrontendLimits& limits);

// Text of one plain prompt.
Status ValidateText(std::string_view text, std::string_view field, const FrontendLimits& limits);

// Each id in [0, vocab_size).
Status ValidateTokenIds(const std::vector<uint32_t>& ids, std::string_view field, int32_t vocab_size);

// "" and the served name are it.
Status ValidateModelName(std::string_view asked, const ServedModel& model);

// nullopt unless the parts agree in sign, nanos are below one second and the value is in (0, 10 years].
std::optional<Duration> ToDuration(const DurationInput& input);

}  // namespace altiplano

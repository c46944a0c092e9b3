// Flags that the client commands share: which server, and how to answer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "server/cli/client.h"
#include "server/cli/flags.h"

namespace altiplano::cli {

Flag UrlFlag();
// --max-tokens, --temperature, ...: unset means the model's own default.
std::vector<Flag> SamplingFlags();
// What was given of SamplingFlags.
void FillSampling(const ParsedFlags& flags, v1::GenerateRequest* request);

// INVALID_ARGUMENT for a setting of a model loaded here, which a server takes no notice of.
Status CheckRemote(const ParsedFlags& flags);

// Connects to --url, waiting briefly. UNAVAILABLE says how to start a server.
StatusOr<std::unique_ptr<Client>> ConnectTo(const ParsedFlags& flags);

// --prompt (or --text), else all of stdin, of which a last newline is dropped.
StatusOr<std::string> TextOrStdin(const ParsedFlags& flags, std::string_view name);

std::string_view FinishName(v1::FinishReason reason);  // "eos", "length"

// An error of a call: on stderr, with details. Returns the exit code.
int FailCall(std::string_view command, const Status& status);

}  // namespace altiplano::cli

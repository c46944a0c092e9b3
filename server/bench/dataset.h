// Datasets: the requests of a load test, from public traces or made up. Pure: files in, values out, random only by
// seed.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/base/types.h"

namespace altiplano::bench {

// A prompt, or a part of one, as the first `length` tokens of an endless random stream. Equal streams are equal tokens:
// that is how prompts share prefixes. Long traces fit into memory, since tokens are made when they are sent.
struct PromptPart {
  uint64_t stream = 0;
  int32_t length = 0;
};

struct LoadRequest {
  std::vector<TokenId> ids;       // the prompt where the dataset has one,
  std::vector<PromptPart> parts;  // else these, one after the other
  int32_t input_tokens = 0;
  int32_t output_tokens = 0;
  Duration arrival{};  // since the first request of the dataset; zero when it has no times
  // What the server is asked for; no dataset has it.
  Duration ttft_target{};
  Duration deadline{};  // of the whole answer; zero: none. Only simulations have it.
  int32_t priority = 0;
  std::string tenant;
};

struct Dataset {
  std::vector<LoadRequest> requests;
  int64_t left_out = 0;  // passed over, since they do not fit max_tokens
  bool timed = false;    // `arrival` holds a trace's times
};

struct DatasetOptions {
  std::string name = "random";  // one of kDatasetNames
  std::string path;
  int64_t num_prompts = 100;
  uint64_t seed = 0;
  // Made-up prompts: a shared beginning, then input_len tokens of its own, each length within +-range_ratio.
  int32_t input_len = 128;
  std::optional<int32_t> output_len;  // of made-up requests (else 64), and instead of what a trace says
  double range_ratio = 0;
  int32_t prefix_len = 0;    // tokens of a shared beginning ("system prompt")
  int32_t num_prefixes = 1;  // different beginnings, used in turn
  double length_scale = 1;   // of a trace's lengths: a long trace for a small model
  int32_t max_tokens = 0;    // prompt and answer of one request at most; 0: any
};

inline constexpr std::string_view kDatasetNames = "random|sharegpt|azure|mooncake|lengths";

// Turns text into ids for files that hold text. Null: such files are refused.
using TokenizeFn = std::function<StatusOr<std::vector<TokenId>>(const std::string& text)>;

// INVALID_ARGUMENT names the file and the line; NOT_FOUND when there is no such file.
StatusOr<Dataset> LoadDataset(const DatasetOptions& options, const TokenizeFn& tokenize);

// LoadDataset's parts, on a file's contents.
//   random: no file.
//   azure, lengths: CSV with a header; columns ContextTokens or num_prefill_tokens, GeneratedTokens or
//     num_decode_tokens, and for azure TIMESTAMP.
//   mooncake: JSON lines; hash_ids name blocks of 512 tokens, equal names become equal tokens.
//   sharegpt: the published JSON array of conversations (text), or JSON lines with input_tok_ids and output_toks.
StatusOr<Dataset> ParseDataset(const DatasetOptions& options, std::string_view contents, const TokenizeFn& tokenize);

// What a tokenizer has: ids are drawn from [0, size), none of `excluded`.
struct Vocabulary {
  int32_t size = 0;
  std::vector<TokenId> excluded;
};
// Ids of a larger vocabulary become others of this one: equal ids equal ones, so that prefixes stay shared.
std::vector<TokenId> PromptOf(const LoadRequest& request, const Vocabulary& vocabulary);
// Requests with ids from a larger vocabulary.
int64_t CountForeign(const Dataset& dataset, int32_t vocabulary_size);

}  // namespace altiplano::bench

// What a checkpoint is and what it needs, for people and for programs ("altiplano inspect").
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "server/base/json_fwd.h"
#include "server/model/checkpoint.h"
#include "server/model/config.h"

namespace altiplano {

// One tensor-parallel size: either what each rank holds, or the one reason why it cannot be.
struct SplitOption {
  int ranks = 1;
  std::string why_not;                   // empty: possible
  uint64_t weight_bytes_per_rank = 0;    // bf16, padding of the last vocabulary shard included
  uint64_t kv_bytes_per_token_rank = 0;  // bf16; does not shrink once KV heads are replicated
  bool possible() const { return why_not.empty(); }
};

// A number of stages, with one rank each; the sizes are of the stage that has most.
struct StageOption {
  int stages = 2;
  uint64_t weight_bytes = 0;        // bf16
  uint64_t kv_bytes_per_token = 0;  // bf16
};

struct StoredBytes {
  uint64_t tensors = 0;
  uint64_t bytes = 0;
};

struct Inspection {
  std::string path, format;
  ModelConfig config;
  GenerationDefaults generation;
  uint64_t parameters = 0;
  uint64_t stored_bytes = 0;
  size_t files = 0;                          // that hold tensors
  std::map<std::string, StoredBytes> types;  // by stored dtype: "BF16", "Q4_1"
  std::vector<TensorInfo> tensors;
  std::string tokenizer;           // "tokenizer.json", "tokenizer.model", "gguf (gpt2, llama-bpe)", "none"
  bool has_chat_template = false;  // whether it is one we know is the text layer's to say
  uint64_t weight_bytes_bf16 = 0, weight_bytes_f32 = 0;  // in memory, one rank; norms are f32 in both
  uint64_t kv_bytes_per_token_bf16 = 0, kv_bytes_per_token_f32 = 0;
  uint64_t kv_bytes_full_context_bf16 = 0;  // one sequence of max_position tokens
  std::vector<SplitOption> splits;          // 1 .. 8 and 16
  std::vector<StageOption> stages;          // 2, 4 and 8, where there are as many layers
};

Inspection Inspect(const Checkpoint& checkpoint);

// Lines "name  value" ending in a newline. with_tensors: a line a tensor after them.
std::string InspectText(const Inspection& inspection, bool with_tensors = false);
// The same facts; byte counts are numbers. Tensors always included. Dump it with
// error_handler_t::replace: a path need not be UTF-8.
OrderedJson InspectJson(const Inspection& inspection);

}  // namespace altiplano

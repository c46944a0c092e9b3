// A Hugging Face model folder: config.json, generation_config.json, tokenizer files and safetensors.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/model/checkpoint.h"

namespace altiplano {

// Opens nothing but .json, .safetensors, .model and .jinja files. Symbolic links are followed (the hub's cache is made
// of them). A folder without safetensors is refused in one sentence that says what is there and how to get them. A
// config that ties the head beside an lm_head.weight on disk is accepted if both hold the same bytes (sampled over the
// rows): transformers 4 uses the embedding in that case and transformers 5 the head, so where they differ nobody can
// know which is meant, and that is an error.
StatusOr<std::unique_ptr<Checkpoint>> OpenHuggingFaceFolder(const std::string& path);

// One shard of model.safetensors.index.json.
struct ShardNames {
  std::string file;
  std::vector<std::string> tensors;  // sorted
};

// weight_map, by file. INVALID_ARGUMENT unless it maps names to plain file names that end in .safetensors.
StatusOr<std::vector<ShardNames>> ParseShardIndex(std::string_view index_json);

// The chat template of a tokenizer_config.json: a string, or of a list of named ones "default"; "" when it has none.
StatusOr<std::string> ParseChatTemplate(std::string_view tokenizer_config_json);

}  // namespace altiplano

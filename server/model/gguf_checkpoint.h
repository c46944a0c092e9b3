// What a GGUF file of architecture "llama" means: metadata to config, names and row order to Hugging Face's.
#pragma once

#include <memory>

#include "server/base/status.h"
#include "server/model/checkpoint.h"
#include "server/model/file_reader.h"
#include "server/model/gguf.h"

namespace altiplano {

// Keys "general.*" and "llama.*". The vocabulary is what the tensor token_embd.weight has rows for; the head is tied
// when there is no output.weight. Errors as of ParseModelConfig.
StatusOr<ModelConfig> GgufModelConfig(const GgufFile& gguf);
// Keys "tokenizer.*" and "general.sampling.*".
StatusOr<TextAssets> GgufTextAssets(const GgufFile& gguf, int64_t vocab);
StatusOr<GenerationDefaults> GgufGenerationDefaults(const GgufFile& gguf, const TextAssets& text, int64_t vocab);

// blk.3.attn_q.weight for model.layers.3.self_attn.q_proj.weight.
std::string GgufTensorName(const std::string& hugging_face_name);

StatusOr<std::unique_ptr<Checkpoint>> OpenGguf(std::shared_ptr<const ByteSource> file);

}  // namespace altiplano

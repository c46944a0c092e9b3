// Writes a checkpoint as a Hugging Face folder.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "server/base/status.h"
#include "server/model/checkpoint.h"
#include "server/model/weights.h"

namespace altiplano {

struct WriteOptions {
  uint64_t max_file_bytes = 5'000'000'000;            // of tensors; more are spread over files with an index
  std::function<void(const LoadProgress&)> progress;  // of bytes written; after every piece
  std::function<bool()> cancelled;                    // asked as often; true: stop with CANCELLED
};

// Tensors in the checkpoint's own dtype (f32 when it is not bf16), tokenizer.json and chat_template.jinja where it has
// them, generation_config.json and, last of all, config.json: a folder without it is no model. FAILED_PRECONDITION when
// `folder` exists and is not empty, RESOURCE_EXHAUSTED when the disk has no room, which is asked before the first byte;
// UNIMPLEMENTED for a config that config.json cannot say. What was written is removed again on an error.
Status WriteFolder(const Checkpoint& checkpoint, const std::string& folder, const WriteOptions& options);

}  // namespace altiplano

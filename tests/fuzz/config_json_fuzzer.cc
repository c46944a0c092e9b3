// Any bytes as each of a model folder's small JSON files: config.json, generation_config.json, the index of shards and
// tokenizer_config.json.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/base/check.h"
#include "server/model/config.h"
#include "server/model/hf_folder.h"

namespace altiplano {
namespace {

constexpr int64_t kVocab = 16;
constexpr std::string_view kConfig = R"({"vocab_size": 16, "eos_token_id": 3, "bos_token_id": 2})";

void CheckRefusal(const Status& status) {
  CHECK(status.code() == Code::kInvalidArgument || status.code() == Code::kUnimplemented);
  CHECK(!status.message().empty() && status.message().size() <= 1000);
}

void ReadConfig(std::string_view json) {
  const auto config = ParseModelConfig(json);
  if (!config.ok()) return CheckRefusal(config.status());
  CHECK(CheckModelConfig(*config).ok());
  CHECK(config->parameters() > 0 && config->kv_bytes_per_token(DType::kF32) > 0);
  if (config->head_dim > 4096) return;  // a table of that size
  for (const float frequency : RopeInverseFrequencies(*config)) CHECK(frequency >= 0 && frequency <= 1);
}

void CheckDefaults(const GenerationDefaults& defaults, int64_t vocab) {
  for (const TokenId id : defaults.eos_ids) CHECK(id >= 0 && id < vocab);
  if (defaults.bos_id) CHECK(*defaults.bos_id >= 0 && *defaults.bos_id < vocab);
  if (defaults.temperature) CHECK(*defaults.temperature >= 0 && std::isfinite(*defaults.temperature));
  if (defaults.top_p) CHECK(*defaults.top_p > 0 && *defaults.top_p <= 1);
  if (defaults.min_p) CHECK(*defaults.min_p >= 0 && *defaults.min_p <= 1);
  if (defaults.repetition_penalty) {
    CHECK(*defaults.repetition_penalty > 0 && std::isfinite(*defaults.repetition_penalty));
  }
  if (defaults.top_k) CHECK(*defaults.top_k >= 0);
}

void ReadGeneration(std::string_view json) {
  const auto defaults = ParseGenerationDefaults(json, kConfig);
  if (defaults.ok()) {
    CheckDefaults(*defaults, kVocab);
  } else {
    CheckRefusal(defaults.status());
  }
  const auto from_config = ParseGenerationDefaults("", json);
  if (from_config.ok()) {
    CheckDefaults(*from_config, INT32_MAX);
  } else {
    CheckRefusal(from_config.status());
  }
}

void ReadIndex(std::string_view json) {
  const auto shards = ParseShardIndex(json);
  if (!shards.ok()) return CheckRefusal(shards.status());
  CHECK(!shards->empty());
  for (const ShardNames& shard : *shards) {
    CHECK(shard.file.ends_with(".safetensors") && shard.file.find('/') == std::string::npos);
    CHECK(!shard.tensors.empty() && std::is_sorted(shard.tensors.begin(), shard.tensors.end()));
  }
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  ReadConfig(json);
  ReadGeneration(json);
  ReadIndex(json);
  if (const auto chat_template = ParseChatTemplate(json); !chat_template.ok()) CheckRefusal(chat_template.status());
  return 0;
}

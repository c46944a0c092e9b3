#include "server/model/random_checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/mix.h"
#include "server/base/split.h"
#include "server/base/strings.h"
#include "server/model/checkpoint_stored.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/file_reader.h"

namespace altiplano {

namespace {

constexpr int64_t kSpecials = 256;

// The bytes of all tensors, one after the other.
class RandomBytes final : public ByteSource {
 public:
  struct Tensor {
    uint64_t begin = 0;  // elements before it
    float middle = 0, reach = 0;
  };

  RandomBytes(std::string name, uint64_t seed, std::vector<Tensor> tensors, uint64_t elements)
      : name_(std::move(name)), seed_(seed), tensors_(std::move(tensors)), elements_(elements) {}

  const std::string& name() const override { return name_; }
  uint64_t size() const override { return elements_ * sizeof(BF16); }
  Status ReadAt(uint64_t offset, void* out, size_t bytes) const override {
    CHECK(offset % sizeof(BF16) == 0 && bytes % sizeof(BF16) == 0 && offset <= size() && bytes <= size() - offset);
    uint64_t element = offset / sizeof(BF16);
    const uint64_t end = element + bytes / sizeof(BF16);
    auto* to = static_cast<char*>(out);
    auto tensor = std::ranges::upper_bound(tensors_, element, {}, &Tensor::begin) - 1;
    for (; element < end; ++tensor) {
      const uint64_t tensor_end = tensor + 1 == tensors_.end() ? elements_ : (tensor + 1)->begin;
      for (; element < std::min(end, tensor_end); ++element, to += sizeof(BF16)) {
        const BF16 value = ToBF16(tensor->middle + tensor->reach * Uniform(element));
        std::memcpy(to, &value, sizeof value);
      }
    }
    return OkStatus();
  }

 private:
  // In (-1, 1). Four neighbours share the 64 bits of a splitmix64 step.
  float Uniform(uint64_t element) const {
    const uint64_t x = Mix(element / 4 * 0x9E3779B97F4A7C15 + seed_ * 0xD1B54A32D192ED03);
    const auto bits = static_cast<int16_t>(static_cast<uint16_t>(x >> element % 4 * 16));
    return (static_cast<float>(bits) + 0.5f) / 32768;
  }

  const std::string name_;
  const uint64_t seed_;
  const std::vector<Tensor> tensors_;  // by ascending begin
  const uint64_t elements_;
};

Status Refuse(std::string_view name, std::string why) {
  return Status(Code::kInvalidArgument, StrCat(name, ": ", why, ". A random model is written ", kRandomPrefix, "8b or ",
                                               kRandomPrefix, "8b,layers=4,seed=7"));
}

std::optional<uint64_t> Number(std::string_view text) {
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// How byte-level BPE spells a byte: printable Latin-1 as itself, the others from U+0100 on.
std::string Spelled(int byte) {
  const auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 128) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

// " aaaa", " aaab", ...: spelled, and different for all that a vocabulary can hold.
std::string Word(int64_t index) {
  std::string letters;
  for (int i = 0; i < 6; ++i, index /= 26) letters.insert(letters.begin(), static_cast<char>('a' + index % 26));
  return Spelled(' ') + letters;
}

// By their places in Llama 3.1's list; the others are reserved.
std::string SpecialToken(int64_t index) {
  static constexpr std::pair<int64_t, const char*> kNamed[] = {
      {0, "begin_of_text"},   {1, "end_of_text"},   {4, "finetune_right_pad_id"},
      {6, "start_header_id"}, {7, "end_header_id"}, {8, "eom_id"},
      {9, "eot_id"},          {10, "python_tag"}};
  int64_t reserved = index;
  for (const auto& [place, name] : kNamed) {
    if (place == index) return StrCat("<|", name, "|>");
    reserved -= place < index;
  }
  return StrCat("<|reserved_special_token_", reserved, "|>");
}

GenerationDefaults GenerationOf(int64_t vocab) {
  const auto first = static_cast<TokenId>(vocab - kSpecials);
  GenerationDefaults defaults;
  defaults.bos_id = first;
  defaults.eos_ids = {first + 1, first + 8, first + 9};
  return defaults;
}

// The model that has as its own what one of `ranks` has of this one. False: it cannot be cut so.
bool TakeOneRank(ModelConfig* config, uint64_t ranks) {
  const auto n = static_cast<int64_t>(std::min<uint64_t>(ranks, INT32_MAX));
  if (n == 0) return false;
  for (int64_t* size : {&config->q_heads, &config->ffn, &config->vocab}) {
    if (*size % n != 0) return false;
    *size /= n;
  }
  config->kv_heads = std::max<int64_t>(1, config->kv_heads / n);
  return CheckModelConfig(*config).ok();
}

}  // namespace

StatusOr<RandomModel> ParseRandomModel(std::string_view name) {
  CHECK(name.starts_with(kRandomPrefix));
  const std::vector<std::string_view> words = Split(name.substr(kRandomPrefix.size()), ',');
  const std::string_view shape = words.empty() ? "" : words.front();
  std::optional<ModelConfig> config = PublishedModelConfig(shape);
  if (!config) return Refuse(name, StrCat("\"", shape, "\" is no published model; these are: 1b, 3b, 8b, 70b, 405b"));
  RandomModel model{.config = *std::move(config)};
  for (const std::string_view word : std::span(words).subspan(std::min<size_t>(1, words.size()))) {
    const size_t equals = std::min(word.find('='), word.size());
    const std::string_view key = word.substr(0, equals);
    const std::optional<uint64_t> value = Number(word.substr(std::min(equals + 1, word.size())));
    if (key != "layers" && key != "seed" && key != "rank-of") {
      return Refuse(name, StrCat("\"", word, "\" is none of layers=N, seed=N and rank-of=N"));
    }
    if (!value) return Refuse(name, StrCat(key, " must be a whole number, not \"", word, "\""));
    if (key == "seed") {
      model.seed = *value;
    } else if (key == "rank-of") {
      if (!TakeOneRank(&model.config, *value)) {
        return Refuse(name, StrCat("there is no model of one rank of ", *value,
                                   ": it must divide query heads, ffn "
                                   "and vocabulary"));
      }
    } else if (*value >= 1 && *value <= static_cast<uint64_t>(model.config.layers)) {
      model.config.layers = static_cast<int64_t>(*value);
    } else {
      return Refuse(name, StrCat("layers is ", *value, ", must be from 1 to ", model.config.layers));
    }
  }
  model.config.name = StrCat("random-", shape);
  return model;
}

std::unique_ptr<Checkpoint> MakeRandomCheckpoint(const RandomModel& model) {
  CheckpointParts parts;
  parts.path = StrCat("<", model.config.name, ">");
  parts.format = "random";
  parts.config = model.config;
  parts.generation = GenerationOf(model.config.vocab);
  parts.text.tokenizer_json = RandomTokenizerJson(model.config.vocab);
  std::vector<RandomBytes::Tensor> tensors;
  uint64_t elements = 0;
  for (WantedTensor& wanted : WantedTensors(model.config)) {
    const bool is_norm = wanted.shape.size() == 1;
    uint64_t count = 1;
    for (int64_t n : wanted.shape) count *= static_cast<uint64_t>(n);
    // Uniform in (-1, 1) has a variance of 1/3.
    tensors.push_back({.begin = elements,
                       .middle = is_norm ? 1.0f : 0.0f,
                       .reach = is_norm ? 0.25f : std::sqrt(3.0f / static_cast<float>(wanted.shape[1]))});
    StoredTensor stored;
    stored.info = {.name = std::move(wanted.name),
                   .dtype = "BF16",
                   .shape = std::move(wanted.shape),
                   .bytes = count * sizeof(BF16),
                   .file = parts.path};
    stored.type = StorageType::kBF16;
    stored.offset = elements * sizeof(BF16);
    parts.tensors.push_back(std::move(stored));
    elements += count;
  }
  parts.files.push_back(std::make_shared<RandomBytes>(parts.path, model.seed, std::move(tensors), elements));
  return std::make_unique<StoredCheckpoint>(std::move(parts));
}

std::string RandomTokenizerJson(int64_t vocab) {
  CHECK(vocab >= 256 + kSpecials);
  const auto quoted = [](const std::string& text) { return Json(text).dump(); };
  const int64_t first_special = vocab - kSpecials;
  std::string words;
  for (int64_t id = 0; id < first_special; ++id) {
    words += StrCat(id ? "," : "", quoted(id < 256 ? Spelled(static_cast<int>(id)) : Word(id - 256)), ":", id);
  }
  std::string specials;
  for (int64_t i = 0; i < kSpecials; ++i) {
    specials += StrCat(i ? "," : "", R"({"id":)", first_special + i, R"(,"content":)", quoted(SpecialToken(i)),
                       R"(,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true})");
  }
  const std::string bos = quoted(SpecialToken(0));
  return StrCat(
      R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[)", specials,
      R"(],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,)",
      R"("use_regex":true},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":)", bos,
      R"(,"type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},)",
      R"({"Sequence":{"id":"B","type_id":1}}],"special_tokens":{)", bos, R"(:{"id":)", bos, R"(,"ids":[)",
      first_special, R"(],"tokens":[)", bos,
      R"(]}}},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},)",
      R"("model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,)",
      R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":true,"vocab":{)", words,
      R"(},"merges":[]}})");
}

}  // namespace altiplano

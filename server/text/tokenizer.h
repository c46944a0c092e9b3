// Tokenizer: byte-pair encoding of text, exact with the checkpoint's own (tiktoken ranks, or merges with
// ignore_merges). Immutable after construction; any thread.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/base/types.h"

namespace altiplano {

// A vocabulary as a GGUF file states it (tokenizer.ggml.*).
struct GgufVocabulary {
  std::string model;                // tokenizer.ggml.model: "gpt2"
  std::string pre;                  // tokenizer.ggml.pre: "llama-bpe", "smollm", ...
  std::vector<std::string> tokens;  // in GPT-2's byte-to-unicode spelling
  std::vector<std::string> merges;  // "left right"
  std::vector<int32_t> types;       // 1 normal, 3 control, 4 user defined, 6 byte
  TokenId bos = -1;
  bool add_bos = false;
};

class Tokenizer {
 public:
  // Meta's tokenizer.model: "base64 rank" lines; the 256 Llama 3 specials follow the ranks.
  static StatusOr<std::shared_ptr<const Tokenizer>> FromTiktoken(std::string_view file);
  // tokenizer.json: BPE with ByteLevel, and one of the pre-tokenizers we know (others: UNIMPLEMENTED naming it).
  static StatusOr<std::shared_ptr<const Tokenizer>> FromHuggingFace(std::string_view tokenizer_json);
  static StatusOr<std::shared_ptr<const Tokenizer>> FromGguf(const GgufVocabulary& vocabulary);
  virtual ~Tokenizer() = default;

  // Appends the ids of plain text. Never produces a special token, whatever the text spells. Linear time.
  // The text need not be valid UTF-8.
  virtual void Encode(std::string_view text, std::vector<TokenId>* ids) const = 0;
  // The same, but it may stop where *ids holds more than `most`, without the rest. False: it did.
  virtual bool EncodeUpTo(size_t most, std::string_view text, std::vector<TokenId>* ids) const {
    (void)most;
    Encode(text, ids);
    return true;
  }

  // The token's bytes; of a special its name, "<|eot_id|>"; "" for ids outside the vocabulary.
  virtual std::string_view TokenBytes(TokenId id) const = 0;
  virtual bool IsSpecial(TokenId id) const = 0;
  virtual std::optional<TokenId> Special(std::string_view name) const = 0;

  virtual int32_t vocab_size() const = 0;          // ids are [0, vocab_size)
  virtual std::optional<TokenId> bos() const = 0;  // put before plain-text prompts; nullopt: the model wants none
};

}  // namespace altiplano

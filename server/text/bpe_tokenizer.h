// The one Tokenizer behind all three file formats: they differ only in how the tables are filled.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "server/base/status.h"
#include "server/text/bpe_vocabulary.h"
#include "server/text/split.h"
#include "server/text/tokenizer.h"

namespace altiplano {

// What a loader read.
struct BpeTables {
  BpeVocabulary vocabulary{0};
  // Absent (tiktoken): two tokens merge into the token that their bytes spell, and its rank is its id; then every byte
  // has a token. Present: the listed merges only.
  std::optional<BpeMerges> merges;
  // A piece that is a token as a whole becomes it, reachable by merges or not (Hugging Face: ignore_merges).
  bool whole_pieces_first = true;
  SplitPattern split = SplitPattern::kLlama3;
  // Tokens found verbatim in text before it is split (leftmost, then longest), as Hugging Face and llama.cpp do with
  // added tokens that are not special. Never special ones.
  std::vector<TokenId> verbatim;
  std::unordered_map<std::string, TokenId> special_aliases;  // further names of special tokens
  std::optional<TokenId> bos;
};

class BpeTokenizer : public Tokenizer {
 public:
  // INVALID_ARGUMENT when the vocabulary cannot be a byte-level one: a byte without a token. With listed merges only
  // printable ASCII and the blank must have one: real vocabularies (SmolLM2's) lack some control and high bytes, which
  // then vanish from the text as they do with Hugging Face.
  static StatusOr<std::shared_ptr<const Tokenizer>> Make(BpeTables tables);

  void Encode(std::string_view text, std::vector<TokenId>* ids) const override { EncodeUpTo(SIZE_MAX, text, ids); }
  bool EncodeUpTo(size_t most, std::string_view text, std::vector<TokenId>* ids) const override;
  std::string_view TokenBytes(TokenId id) const override { return tables_.vocabulary.Bytes(id); }
  bool IsSpecial(TokenId id) const override { return tables_.vocabulary.kind(id) == BpeVocabulary::Kind::kSpecial; }
  std::optional<TokenId> Special(std::string_view name) const override;
  int32_t vocab_size() const override { return tables_.vocabulary.size(); }
  std::optional<TokenId> bos() const override { return tables_.bos; }

 private:
  explicit BpeTokenizer(BpeTables tables);

  // Text without verbatim tokens.
  bool EncodePlain(size_t most, std::string_view text, std::vector<TokenId>* ids) const;
  void Merge(std::string_view piece, std::vector<TokenId>* ids) const;
  TokenId VerbatimAt(std::string_view text) const;  // the longest verbatim token that `text` starts with, or -1

  BpeTables tables_;
  std::array<TokenId, 256> byte_ids_;                            // -1: no token
  std::vector<bool> whole_;                                      // by id: a piece of these bytes becomes this token
  std::unordered_map<std::string_view, TokenId> special_names_;  // views into tables_
  std::array<std::vector<TokenId>, 256> verbatim_;               // by first byte, longest first
};

}  // namespace altiplano

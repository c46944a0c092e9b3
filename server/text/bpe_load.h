// What tokenizer.json and GGUF vocabularies have in common: tokens in GPT-2's byte spelling, added tokens, merges.
#pragma once

#include <string>
#include <string_view>

#include "server/base/status.h"
#include "server/text/bpe_tokenizer.h"

namespace altiplano {

// A vocabulary entry. One whose spelling is not bytes stands for itself and is only decoded.
Status AddSpelledToken(int64_t id, std::string_view spelled, BpeTables* tables);

// Whether an added token is a control token: by its flag, or because it is spelled "<|...|>". Such names are chat
// markers whose flag some fine-tunes forget, and text from users must not be able to forge them.
bool IsSpecialAddedToken(std::string_view text, bool flag);

// A token added beside the vocabulary, its text given as it is. Special ones never come from text; the others are found
// verbatim in it, as Hugging Face and llama.cpp do.
Status AddAddedToken(int64_t id, std::string_view text, bool special, BpeTables* tables);

// Builds the merges in the order of their ranks. Errors name the merge by its index.
class MergeLoader {
 public:
  // The vocabulary must be complete.
  MergeLoader(size_t expected, const BpeVocabulary& vocabulary)
      : vocabulary_(vocabulary), merges_(expected), room_(expected) {}

  Status Add(std::string_view left_blank_right);
  Status Add(std::string_view left, std::string_view right);
  BpeMerges Finish() && { return std::move(merges_); }

 private:
  const BpeVocabulary& vocabulary_;
  BpeMerges merges_;
  size_t room_;
  uint32_t rank_ = 0;
  std::string bytes_;
};

}  // namespace altiplano

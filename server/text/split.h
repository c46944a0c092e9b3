// Pre-tokenization: cuts text into the pieces within which byte pairs merge. Scanners by hand for the regular
// expressions that the tokenizers we support are defined by, with the same result as a backtracking engine, in time
// linear in the text.
#pragma once

#include <string_view>

namespace altiplano {

enum class SplitPattern {
  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
  // (meta-llama/llama-models tokenizer.py; the Split of Llama 3's tokenizer.json)
  kLlama3,
  // '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  // (GPT-2; tokenizer.json's ByteLevel with use_regex)
  kGpt2,
  // Each \p{N} alone, then kGpt2 on what lies between them (tokenizer.json: Digits with individual_digits, ByteLevel).
  kGpt2SingleDigits,
};

inline constexpr std::string_view kLlama3SplitRegex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kGpt2SplitRegex =
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// The length of the first piece of `text`, which is not empty. Pieces cover the text without gaps. A byte that is not
// part of well-formed UTF-8 counts as a character of its own that is neither letter, number nor blank.
size_t FirstPiece(SplitPattern pattern, std::string_view text);

}  // namespace altiplano

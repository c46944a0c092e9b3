// What the tests of the text layer share: data files, vocabularies in each format, slow oracles.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/json.h"
#include "server/text/split.h"
#include "server/text/tokenizer.h"

namespace altiplano::testing {

// The whole file, or nullopt when it cannot be opened.
std::optional<std::string> ReadFileIfPresent(const std::string& path);
std::string DataPath(std::string_view relative);           // in the shared test data, which may be absent
std::vector<Json> ReadJsonLines(const std::string& path);  // fails the test on a malformed line

// Meta's real Llama 3 tokenizer.model; null when the shared data is absent. Loaded once.
std::shared_ptr<const Tokenizer> Llama3OrNull();
std::shared_ptr<const Tokenizer> TinyTokenizer();  // of the committed tiny model

std::vector<TokenId> Encode(const Tokenizer& tokenizer, std::string_view text);
std::string Decode(const Tokenizer& tokenizer, const std::vector<TokenId>& ids);

std::string SpellBytes(std::string_view bytes);  // GPT-2's spelling, as vocabulary files have it

// The ranks of a tiktoken file: token bytes by rank.
std::vector<std::string> TiktokenRanks(std::string_view file);
// All merges that the ranks imply, as Hugging Face's converter lists them: by merged rank, then by the halves' ranks.
std::vector<std::pair<std::string, std::string>> ImpliedMerges(const std::vector<std::string>& ranks);
// Those ranks as a tokenizer.json with Llama 3's pre-tokenizer and the special tokens named; merges as pairs or "a b".
std::string MakeTokenizerJson(const std::vector<std::string>& ranks, const std::vector<std::string>& specials,
                              bool merges_as_pairs);
// The tokenizer fields of a GGUF file's metadata; nullopt when the file is absent.
std::optional<GgufVocabulary> ReadGgufVocabulary(const std::string& path);

// Pieces by a backtracking matcher that interprets the pattern's regular expression.
std::vector<std::string> SplitByRegex(SplitPattern pattern, std::string_view text);

}  // namespace altiplano::testing

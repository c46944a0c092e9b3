// The vocabulary of a GGUF file (ggml docs/gguf.md, tokenizer.ggml.*): GPT-2's byte spelling, merges as "left right".
#include "server/base/strings.h"
#include "server/text/bpe_load.h"
#include "server/text/bpe_tokenizer.h"

namespace altiplano {

namespace {

// llama.cpp's names of token types.
enum GgufTokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

Status ChooseSplit(const GgufVocabulary& gguf, BpeTables* tables) {
  if (gguf.pre == "llama-bpe" || gguf.pre == "llama3" || gguf.pre == "llama-v3") {
    tables->split = SplitPattern::kLlama3;
    tables->whole_pieces_first = true;
  } else if (gguf.pre == "smollm") {
    tables->split = SplitPattern::kGpt2SingleDigits;
    tables->whole_pieces_first = false;
  } else if (gguf.pre == "gpt-2") {
    tables->split = SplitPattern::kGpt2;
    tables->whole_pieces_first = false;
  } else {
    return Status(Code::kUnimplemented, StrCat("tokenizer.ggml.pre is ", QuoteToken(gguf.pre),
                                               "; supported are \"llama-bpe\", \"smollm\" and \"gpt-2\""));
  }
  return OkStatus();
}

Status AddToken(const GgufVocabulary& gguf, size_t i, BpeTables* tables) {
  using Kind = BpeVocabulary::Kind;
  const std::string& spelled = gguf.tokens[i];
  const auto id = static_cast<int64_t>(i);
  const int32_t type = gguf.types.empty() ? int32_t{kNormal} : gguf.types[i];
  switch (type) {
    case kControl:
    case kUnknown:
      return tables->vocabulary.Add(id, spelled, Kind::kSpecial);
    case kUserDefined:
      return AddAddedToken(id, spelled, /*special=*/false, tables);
    case kUnused:
      return tables->vocabulary.Add(id, spelled, Kind::kDecode);
    case kNormal:
    case kByte:
      return AddSpelledToken(id, spelled, tables);
    default:
      return Status(Code::kInvalidArgument, StrCat("token ", QuoteToken(spelled), " has the unknown type ", type));
  }
}

}  // namespace

StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::FromGguf(const GgufVocabulary& gguf) {
  if (gguf.model != "gpt2") {
    return Status(Code::kUnimplemented,
                  StrCat("tokenizer.ggml.model is ", QuoteToken(gguf.model), "; supported is \"gpt2\""));
  }
  BpeTables tables;
  RETURN_IF_ERROR(ChooseSplit(gguf, &tables));
  if (!gguf.types.empty() && gguf.types.size() != gguf.tokens.size()) {
    return Status(Code::kInvalidArgument, StrCat("tokenizer.ggml.token_type has ", gguf.types.size(), " entries for ",
                                                 gguf.tokens.size(), " tokens"));
  }
  tables.vocabulary = BpeVocabulary(gguf.tokens.size());
  for (size_t i = 0; i < gguf.tokens.size(); ++i) RETURN_IF_ERROR(AddToken(gguf, i, &tables));
  MergeLoader merges(gguf.merges.size(), tables.vocabulary);
  for (const std::string& merge : gguf.merges) RETURN_IF_ERROR(merges.Add(merge));
  tables.merges = std::move(merges).Finish();
  if (gguf.add_bos) {
    if (tables.vocabulary.kind(gguf.bos) == BpeVocabulary::Kind::kNone) {
      return Status(Code::kInvalidArgument,
                    StrCat("tokenizer.ggml.bos_token_id ", gguf.bos, " is no token of the vocabulary"));
    }
    tables.bos = gguf.bos;
  }
  return BpeTokenizer::Make(std::move(tables));
}

}  // namespace altiplano

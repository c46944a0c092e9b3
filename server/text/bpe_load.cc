#include "server/text/bpe_load.h"

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

Status AddSpelledToken(int64_t id, std::string_view spelled, BpeTables* tables) {
  std::string bytes;
  if (AppendSpelledBytes(spelled, &bytes)) return tables->vocabulary.Add(id, bytes, BpeVocabulary::Kind::kText);
  return tables->vocabulary.Add(id, spelled, BpeVocabulary::Kind::kDecode);
}

bool IsSpecialAddedToken(std::string_view text, bool flag) {
  return flag || (text.size() > 4 && text.starts_with("<|") && text.ends_with("|>"));
}

Status AddAddedToken(int64_t id, std::string_view text, bool special, BpeTables* tables) {
  using Kind = BpeVocabulary::Kind;
  BpeVocabulary& vocabulary = tables->vocabulary;
  if (IsSpecialAddedToken(text, special)) return vocabulary.Add(id, text, Kind::kSpecial);
  const bool in_vocabulary = id >= 0 && id < vocabulary.size() && vocabulary.Bytes(static_cast<TokenId>(id)) == text;
  if (!in_vocabulary) {
    RETURN_IF_ERROR(vocabulary.Add(id, text, vocabulary.Find(text) < 0 ? Kind::kText : Kind::kDecode));
  }
  tables->verbatim.push_back(static_cast<TokenId>(id));
  return OkStatus();
}

Status MergeLoader::Add(std::string_view merge) {
  const size_t blank = merge.find(' ');
  if (blank == std::string_view::npos || merge.find(' ', blank + 1) != std::string_view::npos) {
    return Status(Code::kInvalidArgument, StrCat("merges[", rank_, "]: ", QuoteToken(merge), " is not \"left right\""));
  }
  return Add(merge.substr(0, blank), merge.substr(blank + 1));
}

Status MergeLoader::Add(std::string_view left, std::string_view right) {
  CHECK(rank_ < room_);
  const auto error = [&](const auto&... what) {
    return Status(Code::kInvalidArgument, StrCat("merges[", rank_, "]: ", what...));
  };
  bytes_.clear();
  if (!AppendSpelledBytes(left, &bytes_)) return error(QuoteToken(left), " is not spelled in bytes");
  const size_t middle = bytes_.size();
  if (!AppendSpelledBytes(right, &bytes_)) return error(QuoteToken(right), " is not spelled in bytes");
  const std::string_view bytes = bytes_;
  TokenId ids[3];
  const std::string_view parts[3] = {bytes.substr(0, middle), bytes.substr(middle), bytes};
  for (int i = 0; i < 3; ++i) {
    ids[i] = vocabulary_.Find(parts[i]);
    if (ids[i] < 0) return error("the vocabulary has no text token ", QuoteToken(parts[i]));
  }
  if (!merges_.Add(ids[0], ids[1], {rank_, ids[2]})) {
    return error(QuoteToken(parts[0]), " + ", QuoteToken(parts[1]), " is listed twice");
  }
  ++rank_;
  return OkStatus();
}

}  // namespace altiplano

#include "server/text/bpe_tokenizer.h"

#include <algorithm>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/text/bpe_merge.h"

namespace altiplano {

StatusOr<std::shared_ptr<const Tokenizer>> BpeTokenizer::Make(BpeTables tables) {
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    const bool required = !tables.merges.has_value() || (b >= 0x20 && b < 0x7F);
    if (required && tables.vocabulary.Find({&byte, 1}) < 0) {
      return Status(Code::kInvalidArgument,
                    StrCat("no token for the single byte ", StrFormat("0x%02x", static_cast<unsigned>(b)),
                           ": not a complete byte-level vocabulary"));
    }
  }
  return std::shared_ptr<const Tokenizer>(new BpeTokenizer(std::move(tables)));
}

BpeTokenizer::BpeTokenizer(BpeTables tables) : tables_(std::move(tables)) {
  const BpeVocabulary& vocabulary = tables_.vocabulary;
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    byte_ids_[static_cast<size_t>(b)] = vocabulary.Find({&byte, 1});
  }
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    if (IsSpecial(id)) special_names_.emplace(vocabulary.Bytes(id), id);
  }
  for (const auto& [name, id] : tables_.special_aliases) special_names_.emplace(name, id);
  for (const TokenId id : tables_.verbatim) {
    CHECK(!IsSpecial(id) && !vocabulary.Bytes(id).empty());
    verbatim_[static_cast<uint8_t>(vocabulary.Bytes(id)[0])].push_back(id);
  }
  for (auto& ids : verbatim_) {
    std::sort(ids.begin(), ids.end(),
              [&](TokenId a, TokenId b) { return vocabulary.Bytes(a).size() > vocabulary.Bytes(b).size(); });
  }
  // Without whole_pieces_first the look-up of whole pieces is only a short cut, for tokens that merging would reach.
  whole_.assign(static_cast<size_t>(vocabulary.size()), tables_.whole_pieces_first);
  if (tables_.whole_pieces_first) return;
  std::vector<TokenId> ids;
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    if (vocabulary.kind(id) != BpeVocabulary::Kind::kText) continue;
    ids.clear();
    Merge(vocabulary.Bytes(id), &ids);
    whole_[static_cast<size_t>(id)] = ids.size() == 1 && ids[0] == id;
  }
}

std::optional<TokenId> BpeTokenizer::Special(std::string_view name) const {
  const auto it = special_names_.find(name);
  if (it == special_names_.end()) return std::nullopt;
  return it->second;
}

bool BpeTokenizer::EncodeUpTo(size_t most, std::string_view text, std::vector<TokenId>* ids) const {
  if (tables_.verbatim.empty()) return EncodePlain(most, text, ids);
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const TokenId id = VerbatimAt(text.substr(at));
    if (id < 0) {
      ++at;
      continue;
    }
    if (!EncodePlain(most, text.substr(begin, at - begin), ids)) return false;
    ids->push_back(id);
    begin = at += TokenBytes(id).size();
  }
  return EncodePlain(most, text.substr(begin), ids);
}

TokenId BpeTokenizer::VerbatimAt(std::string_view text) const {
  for (const TokenId id : verbatim_[static_cast<uint8_t>(text[0])]) {
    if (text.starts_with(TokenBytes(id))) return id;
  }
  return -1;
}

bool BpeTokenizer::EncodePlain(size_t most, std::string_view text, std::vector<TokenId>* ids) const {
  while (!text.empty()) {
    if (ids->size() > most) return false;
    const std::string_view piece = text.substr(0, FirstPiece(tables_.split, text));
    text.remove_prefix(piece.size());
    const TokenId id = piece.size() <= tables_.vocabulary.max_text_bytes() ? tables_.vocabulary.Find(piece) : -1;
    if (id >= 0 && whole_[static_cast<size_t>(id)]) {
      ids->push_back(id);
    } else {
      Merge(piece, ids);
    }
  }
  return true;
}

void BpeTokenizer::Merge(std::string_view piece, std::vector<TokenId>* ids) const {
  CHECK(piece.size() < std::numeric_limits<uint32_t>::max());
  BpeSymbol short_symbols[kMaxShortPiece];
  std::vector<BpeSymbol> long_symbols;
  const bool is_short = piece.size() <= kMaxShortPiece;
  if (!is_short) long_symbols.resize(piece.size());
  BpeSymbol* symbols = is_short ? short_symbols : long_symbols.data();
  size_t n = 0;
  for (uint32_t i = 0; i < piece.size(); ++i) {
    const TokenId id = byte_ids_[static_cast<uint8_t>(piece[i])];
    if (id >= 0) symbols[n++] = {i, 1, id};  // bytes without a token vanish; their neighbours then meet
  }
  const auto merge = [&](const auto& rank) {
    if (is_short) return MergeShort(symbols, n, rank, ids);
    long_symbols.resize(n);
    MergeLong(&long_symbols, rank, ids);
  };
  if (tables_.merges) {
    merge(RankByMerges(*tables_.merges));
  } else {
    merge(RankByBytes(tables_.vocabulary, piece));
  }
}

}  // namespace altiplano

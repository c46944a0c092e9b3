// Meta's tokenizer.model: text, one "base64-of-the-token rank" a line; the rank is the id and the order of merging. The
// file does not list the 256 special tokens; they follow the ranks (meta-llama/llama-models,
// models/llama3/tokenizer.py).
#include <array>
#include <charconv>
#include <vector>

#include "server/base/strings.h"
#include "server/text/bpe_tokenizer.h"

namespace altiplano {

namespace {

constexpr std::array<int8_t, 256> kBase64Value = [] {
  std::array<int8_t, 256> table{};
  table.fill(-1);
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < kDigits.size(); ++i) table[static_cast<uint8_t>(kDigits[i])] = static_cast<int8_t>(i);
  return table;
}();

// RFC 4648 with padding, strict.
bool DecodeBase64(std::string_view text, std::string* out) {
  out->clear();
  if (text.empty() || text.size() % 4 != 0) return false;
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
  uint32_t bits = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const int8_t value = i >= text.size() - padding ? int8_t{0} : kBase64Value[static_cast<uint8_t>(text[i])];
    if (value < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(value);
    if (i % 4 != 3) continue;
    for (int shift = 16; shift >= 0; shift -= 8) out->push_back(static_cast<char>(bits >> shift));
    bits = 0;
  }
  // What padding stands for must be zero, or two spellings would mean one token.
  for (size_t i = 0; i < padding; ++i) {
    if (out->back() != 0) return false;
    out->pop_back();
  }
  return true;
}

// The names of Llama 3.1's 256 special tokens, as Hugging Face's files have them. Ids agree in all Llama 3.x; Meta's
// own later code names two reserved ones.
std::string Llama3SpecialName(int i) {
  switch (i) {
    case 0:
      return "<|begin_of_text|>";
    case 1:
      return "<|end_of_text|>";
    case 2:
      return "<|reserved_special_token_0|>";
    case 3:
      return "<|reserved_special_token_1|>";
    case 4:
      return "<|finetune_right_pad_id|>";
    case 5:
      return "<|reserved_special_token_2|>";
    case 6:
      return "<|start_header_id|>";
    case 7:
      return "<|end_header_id|>";
    case 8:
      return "<|eom_id|>";
    case 9:
      return "<|eot_id|>";
    case 10:
      return "<|python_tag|>";
    default:
      return StrCat("<|reserved_special_token_", i - 8, "|>");
  }
}
constexpr int kLlama3Specials = 256;

}  // namespace

StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::FromTiktoken(std::string_view file) {
  BpeTables tables;
  tables.vocabulary = BpeVocabulary(file.size() / 16);
  BpeVocabulary& vocabulary = tables.vocabulary;
  std::string bytes;
  int64_t count = 0;
  for (int64_t line_number = 1; !file.empty(); ++line_number) {
    const size_t end = std::min(file.find('\n'), file.size());
    std::string_view line = file.substr(0, end);
    file.remove_prefix(std::min(end + 1, file.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const auto error = [&](const auto&... what) {
      return Status(Code::kInvalidArgument, StrCat("line ", line_number, ": ", what...));
    };
    const size_t blank = line.find(' ');
    if (blank == std::string_view::npos) return error("no \"base64 rank\" pair");
    if (!DecodeBase64(line.substr(0, blank), &bytes)) return error("not base64: ", QuoteToken(line.substr(0, blank)));
    const std::string_view number = line.substr(blank + 1);
    int64_t rank = -1;
    const auto [stop, result] = std::from_chars(number.data(), number.data() + number.size(), rank);
    if (result != std::errc() || stop != number.data() + number.size()) {
      return error("the rank is not a number: ", QuoteToken(number));
    }
    if (Status status = vocabulary.Add(rank, bytes, BpeVocabulary::Kind::kText); !status.ok()) {
      return error(status.message());
    }
    ++count;
  }
  // A gap would move the special tokens.
  for (TokenId id = 0; id < vocabulary.size(); ++id) {
    if (vocabulary.kind(id) == BpeVocabulary::Kind::kNone) {
      return Status(Code::kInvalidArgument,
                    StrCat("rank ", id, " is missing below the highest, ", vocabulary.size() - 1));
    }
  }
  if (count == 0) return Status(Code::kInvalidArgument, "no ranks: not a tiktoken file");
  for (int i = 0; i < kLlama3Specials; ++i) {
    RETURN_IF_ERROR(vocabulary.Add(count + i, Llama3SpecialName(i), BpeVocabulary::Kind::kSpecial));
  }
  const auto first_special = static_cast<TokenId>(count);
  tables.special_aliases = {{"<|step_id|>", first_special + 5}, {"<|image|>", first_special + 11}};
  tables.bos = first_special;
  return BpeTokenizer::Make(std::move(tables));
}

}  // namespace altiplano

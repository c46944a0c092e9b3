#include "server/text/incremental_decoder.h"

#include <utility>

#include "server/text/unicode.h"

namespace altiplano {

IncrementalDecoder::IncrementalDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool keep_special)
    : tokenizer_(std::move(tokenizer)), keep_special_(keep_special) {}

std::string IncrementalDecoder::Push(TokenId id) {
  // A special token that is left out does not even end a code point: bytes concatenate as if it were not there.
  if (!keep_special_ && tokenizer_->IsSpecial(id)) return "";
  pending_ += tokenizer_->TokenBytes(id);
  return Drain(/*at_end=*/false);
}

std::string IncrementalDecoder::Flush() {
  return Drain(/*at_end=*/true);
}

std::string IncrementalDecoder::Drain(bool at_end) {
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Char c = DecodeUtf8(rest);
    if (c.kind == Utf8Char::kTruncated && !at_end) break;
    if (c.kind == Utf8Char::kValid) {
      out += rest.substr(0, c.length);
    } else {
      out += "\xEF\xBF\xBD";
    }
    rest.remove_prefix(c.length);
  }
  pending_.erase(0, pending_.size() - rest.size());
  return out;
}

}  // namespace altiplano

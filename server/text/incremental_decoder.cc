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

namespace {

// The first two bytes of a surrogate, ED A0..BF: hopeless, yet CPython's incremental decoder, whose chunks other
// servers send, waits for the third before it reports all of them. The text is the same.
bool IsHalfSurrogate(std::string_view bytes) {
  return bytes.size() == 2 && bytes[0] == '\xED' && static_cast<uint8_t>(bytes[1]) >= 0xA0 &&
         static_cast<uint8_t>(bytes[1]) < 0xC0;
}

}  // namespace

std::string IncrementalDecoder::Drain(bool at_end) {
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Char c = DecodeUtf8(rest);
    if (!at_end && (c.kind == Utf8Char::kTruncated || IsHalfSurrogate(rest))) break;
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

// Tokens of any bytes: the chunks are whole code points, add up to the text decoded as a whole, and hold back only what
// could still become one.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/text/incremental_decoder.h"

namespace altiplano {
namespace {

// Token i is the i-th field of the input, cut at NUL; one that begins with \x01 is special and named by the rest.
class FieldTokens : public Tokenizer {
 public:
  explicit FieldTokens(std::string_view input) {
    while (!input.empty()) {
      const size_t end = std::min(input.find('\0'), input.size());
      const std::string_view field = input.substr(0, end);
      special_.push_back(field.starts_with('\x01'));
      tokens_.emplace_back(field.substr(special_.back() ? 1 : 0));
      input.remove_prefix(std::min(end + 1, input.size()));
    }
  }

  void Encode(std::string_view, std::vector<TokenId>*) const override {}
  std::string_view TokenBytes(TokenId id) const override { return tokens_[static_cast<size_t>(id)]; }
  bool IsSpecial(TokenId id) const override { return special_[static_cast<size_t>(id)]; }
  std::optional<TokenId> Special(std::string_view) const override { return std::nullopt; }
  int32_t vocab_size() const override { return static_cast<int32_t>(tokens_.size()); }
  std::optional<TokenId> bos() const override { return std::nullopt; }

 private:
  std::vector<std::string> tokens_;
  std::vector<bool> special_;
};

// UTF-8 from its bit layout: the code points that `bytes` begin, as a range, or an empty one. `missing` is set to the
// number of bytes that are still to come.
struct Codes {
  uint32_t first = 1, last = 0;
};
Codes CodesOf(std::string_view bytes, size_t* missing) {
  const auto lead = static_cast<uint8_t>(bytes[0]);
  const size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
  if (length == 0 || bytes.size() > length) return {};
  uint32_t code = length == 1 ? lead : lead & (0x7Fu >> length);
  for (const char c : bytes.substr(1)) {
    if ((c & 0xC0) != 0x80) return {};
    code = code << 6 | (c & 0x3F);
  }
  *missing = length - bytes.size();
  constexpr uint32_t kFirst[] = {0, 0, 0x80, 0x800, 0x10000}, kLast[] = {0, 0x7F, 0x7FF, 0xFFFF, 0x10FFFF};
  Codes codes{std::max(code << 6 * *missing, kFirst[length]),
              std::min(code << 6 * *missing | ((1u << 6 * *missing) - 1), kLast[length])};
  if (codes.first >= 0xD800 && codes.last <= 0xDFFF) return {};  // surrogates only
  return codes;
}

struct Step {
  size_t length;  // of a code point, or of a maximal bad subpart
  bool good;
  bool could_grow;  // the text ends here, and a further byte could make it longer
};
Step FirstStep(std::string_view text) {
  Step step{1, false, false};
  for (size_t n = 1; n <= std::min<size_t>(4, text.size()); ++n) {
    size_t missing = 0;
    const Codes codes = CodesOf(text.substr(0, n), &missing);
    if (codes.first > codes.last) break;
    step = {n, missing == 0, missing > 0 && n == text.size()};
  }
  return step;
}

struct Whole {
  std::string text;  // with U+FFFD for each maximal bad subpart
  size_t held = 0;   // bytes at the end that could still become a code point, as text of `held_text`
  std::string held_text;
};
Whole DecodeWhole(std::string_view bytes) {
  Whole whole;
  while (!bytes.empty()) {
    const Step step = FirstStep(bytes);
    const std::string piece = step.good ? std::string(bytes.substr(0, step.length)) : "\uFFFD";
    if (step.could_grow) {
      whole.held = step.length;
      whole.held_text = piece;
    } else {
      whole.text += piece;
    }
    bytes.remove_prefix(step.length);
  }
  return whole;
}

void Run(const std::shared_ptr<const FieldTokens>& tokens, bool keep_special) {
  IncrementalDecoder decoder(tokens, keep_special);
  std::string bytes, text;
  for (TokenId id = 0; id < tokens->vocab_size(); ++id) {
    if (keep_special || !tokens->IsSpecial(id)) bytes += tokens->TokenBytes(id);
    const std::string chunk = decoder.Push(id);
    CHECK(IsValidUtf8(chunk));
    text += chunk;
    const Whole whole = DecodeWhole(bytes);
    CHECK(IsValidUtf8(bytes) == (whole.text == bytes));
    // ED A0..BF begin only surrogates, which are held back one byte longer than they need be.
    const bool half_surrogate = bytes.size() >= 2 && whole.text.ends_with("\uFFFD\uFFFD") &&
                                bytes.end()[-2] == '\xED' && (bytes.end()[-1] & 0xE0) == 0xA0;
    CHECK(text == whole.text.substr(0, whole.text.size() - (half_surrogate ? 6 : 0)));
    CHECK(whole.held <= 3);
  }
  text += decoder.Flush();
  const Whole whole = DecodeWhole(bytes);
  CHECK(text == whole.text + whole.held_text);
  CHECK(decoder.Flush().empty());
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 512) return 0;  // the whole is decoded anew after each token
  using namespace altiplano;
  const auto tokens = std::make_shared<const FieldTokens>(std::string_view(reinterpret_cast<const char*>(data), size));
  Run(tokens, false);
  Run(tokens, true);
  return 0;
}

#include "server/text/split.h"

#include <array>
#include <cstdint>

#include "server/text/unicode.h"

namespace altiplano {

namespace {

// ASCII, nearly all of most texts, skips the decoder.
constexpr std::array<CharClass, 128> kAsciiClass = [] {
  std::array<CharClass, 128> classes{};
  for (char32_t c = 0; c < 128; ++c) classes[c] = ClassOf(c);
  return classes;
}();

struct Char {
  CharClass cls;
  uint8_t length;
};

// Reads characters of one text by byte position; at() must lie before the end.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  size_t size() const { return text_.size(); }
  char byte(size_t at) const { return text_[at]; }
  bool IsNewline(size_t at) const { return text_[at] == '\r' || text_[at] == '\n'; }

  Char at(size_t at) const {
    const uint8_t byte = static_cast<uint8_t>(text_[at]);
    if (byte < 128) return {kAsciiClass[byte], 1};
    const Utf8Char c = DecodeUtf8(text_.substr(at));
    if (c.kind != Utf8Char::kValid) return {CharClass::kOther, 1};
    return {ClassOf(c.code_point), c.length};
  }

  bool Is(size_t at, CharClass cls) const { return at < size() && this->at(at).cls == cls; }

  // The end of the run of `cls` that starts at `at`.
  size_t Run(size_t at, CharClass cls) const {
    while (at < size()) {
      const Char c = this->at(at);
      if (c.cls != cls) break;
      at += c.length;
    }
    return at;
  }

 private:
  std::string_view text_;
};

// The length of a contraction ('s, 't, 'm, 'd, 're, 've, 'll) at the start of the text, or 0. Ignoring case follows
// Unicode's simple folding: of the letters here only s has a third form, U+017F (long s, C5 BF).
size_t Contraction(const Reader& in, bool ignore_case) {
  if (in.byte(0) != '\'' || in.size() < 2) return 0;
  const auto letter = [&](size_t at) -> char {
    const char c = in.byte(at);
    return ignore_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  const char first = letter(1);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if (in.size() < 3) return 0;
  const char second = letter(2);
  if ((first == 'r' || first == 'v') && second == 'e') return 3;
  if (first == 'l' && second == 'l') return 3;
  if (ignore_case && first == '\xC5' && second == '\xBF') return 3;
  return 0;
}

// `\s+(?!\S)|\s+` where a run of blanks starts, ending at `end`: all of it at the end of the text; else all but the
// last blank, which the next piece takes as its prefix, unless it is the only one. The last blank starts at `last`.
size_t Blanks(size_t last, size_t end, bool at_end) {
  return at_end || last == 0 ? end : last;
}

struct BlankRun {
  size_t end = 0;          // of the run
  size_t last = 0;         // start of its last blank
  size_t newline_end = 0;  // after its last \r or \n; 0: none
};

BlankRun ScanBlanks(const Reader& in) {
  BlankRun run;
  while (run.end < in.size()) {
    const Char c = in.at(run.end);
    if (c.cls != CharClass::kSpace) break;
    run.last = run.end;
    run.end += c.length;
    if (in.IsNewline(run.last)) run.newline_end = run.end;
  }
  return run;
}

size_t FirstLlama3(const Reader& in) {
  if (const size_t length = Contraction(in, /*ignore_case=*/true)) return length;
  const Char first = in.at(0);
  size_t end = first.length;
  switch (first.cls) {
    case CharClass::kLetter:
      return in.Run(end, CharClass::kLetter);
    case CharClass::kNumber:
      for (int i = 1; i < 3 && in.Is(end, CharClass::kNumber); ++i) end += in.at(end).length;
      return end;
    case CharClass::kSpace:
      if (!in.IsNewline(0) && in.Is(end, CharClass::kLetter)) return in.Run(end, CharClass::kLetter);
      if (in.byte(0) != ' ' || !in.Is(end, CharClass::kOther)) {
        const BlankRun run = ScanBlanks(in);
        // `\s*[\r\n]+` takes the whole run and gives back until a newline is last.
        return run.newline_end != 0 ? run.newline_end : Blanks(run.last, run.end, run.end == in.size());
      }
      break;
    case CharClass::kOther:
      if (in.Is(end, CharClass::kLetter)) return in.Run(end, CharClass::kLetter);
      break;
  }
  end = in.Run(end, CharClass::kOther);  // ` ?[^\s\p{L}\p{N}]+[\r\n]*`
  while (end < in.size() && in.IsNewline(end)) ++end;
  return end;
}

size_t FirstGpt2(const Reader& in, bool single_digits) {
  if (const size_t length = Contraction(in, /*ignore_case=*/false)) return length;
  const Char first = in.at(0);
  if (first.cls == CharClass::kNumber && single_digits) return first.length;
  if (first.cls != CharClass::kSpace) return in.Run(first.length, first.cls);
  if (in.byte(0) == ' ' && in.size() > 1) {
    const CharClass next = in.at(1).cls;
    if (next != CharClass::kSpace && !(next == CharClass::kNumber && single_digits)) return in.Run(1, next);
  }
  const BlankRun run = ScanBlanks(in);
  // A digit that stands alone has cut the text before the regex runs, so that it ends the text for `(?!\S)`.
  return Blanks(run.last, run.end, run.end == in.size() || (single_digits && in.Is(run.end, CharClass::kNumber)));
}

}  // namespace

size_t FirstPiece(SplitPattern pattern, std::string_view text) {
  const Reader in(text);
  if (pattern == SplitPattern::kLlama3) return FirstLlama3(in);
  return FirstGpt2(in, pattern == SplitPattern::kGpt2SingleDigits);
}

}  // namespace altiplano

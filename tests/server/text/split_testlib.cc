// The oracle of the split: a small backtracking matcher for the regular expressions that SplitPattern documents, run on
// code points. Exponential in bad cases and obvious in all.
#include <functional>
#include <utility>

#include "server/base/check.h"
#include "server/text/unicode.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano::testing {

namespace {

constexpr char32_t kBadByte = 0x110000;  // stands for a byte outside well-formed UTF-8

using Text = std::vector<char32_t>;
using Set = std::function<bool(char32_t)>;
using Done = std::function<bool(size_t)>;  // called with the end of a match; false: try another

struct Node;
using Sequence = std::vector<Node>;

struct Node {
  Set set;                          // one character; or
  std::vector<Sequence> branches;   // a group; or
  bool negative_lookahead = false;  // (?!set)
  size_t min = 1, max = 1;
};

bool MatchSequence(const Sequence& sequence, size_t item, const Text& text, size_t at, const Done& done);

bool MatchBranches(const std::vector<Sequence>& branches, const Text& text, size_t at, const Done& done) {
  for (const Sequence& branch : branches) {
    if (MatchSequence(branch, 0, text, at, done)) return true;
  }
  return false;
}

bool MatchNode(const Node& node, size_t count, const Text& text, size_t at, const Done& done) {
  if (count < node.max) {  // greedy: one more first
    const Done again = [&](size_t end) { return MatchNode(node, count + 1, text, end, done); };
    if (node.set ? at < text.size() && node.set(text[at]) && again(at + 1)
                 : MatchBranches(node.branches, text, at, again)) {
      return true;
    }
  }
  return count >= node.min && done(at);
}

bool MatchSequence(const Sequence& sequence, size_t item, const Text& text, size_t at, const Done& done) {
  if (item == sequence.size()) return done(at);
  const Node& node = sequence[item];
  const Done rest = [&](size_t end) { return MatchSequence(sequence, item + 1, text, end, done); };
  if (node.negative_lookahead) return !(at < text.size() && node.set(text[at])) && rest(at);
  return MatchNode(node, 0, text, at, rest);
}

class Parser {
 public:
  explicit Parser(std::string_view regex) : in_(regex) {}
  std::vector<Sequence> Alternation() {
    std::vector<Sequence> branches(1);
    while (!in_.empty() && in_[0] != ')') {
      if (Take("|")) {
        branches.emplace_back();
      } else {
        branches.back().push_back(Quantified());
      }
    }
    return branches;
  }

 private:
  bool Take(std::string_view word) {
    if (!in_.starts_with(word)) return false;
    in_.remove_prefix(word.size());
    return true;
  }

  Node Quantified() {
    Node node;
    if (Take("(?!")) {
      node.negative_lookahead = true;
      node.set = OneSet();
      CHECK(Take(")"));
      return node;
    }
    const bool fold = Take("(?i:");
    if (fold || Take("(?:")) {
      const bool outer = ignore_case_;
      ignore_case_ = ignore_case_ || fold;
      node.branches = Alternation();
      ignore_case_ = outer;
      CHECK(Take(")"));
    } else {
      node.set = OneSet();
    }
    constexpr size_t kMany = ~size_t{0};
    if (Take("?")) node.min = 0;
    if (Take("*")) node.min = 0, node.max = kMany;
    if (Take("+")) node.max = kMany;
    if (Take("{1,3}")) node.max = 3;
    return node;
  }

  Set OneSet() {
    if (Take("[^")) return [inner = Members()](char32_t c) { return !inner(c); };
    if (Take("[")) return Members();
    return Member();
  }

  Set Members() {
    std::vector<Set> sets;
    while (!Take("]")) sets.push_back(Member());
    return [sets](char32_t c) {
      for (const Set& set : sets) {
        if (set(c)) return true;
      }
      return false;
    };
  }

  Set Member() {
    const auto is = [](CharClass cls) { return [cls](char32_t c) { return c != kBadByte && ClassOf(c) == cls; }; };
    if (Take("\\p{L}")) return is(CharClass::kLetter);
    if (Take("\\p{N}")) return is(CharClass::kNumber);
    if (Take("\\s")) return is(CharClass::kSpace);
    if (Take("\\S")) return [blank = is(CharClass::kSpace)](char32_t c) { return !blank(c); };
    if (Take("\\r")) return [](char32_t c) { return c == '\r'; };
    if (Take("\\n")) return [](char32_t c) { return c == '\n'; };
    const char32_t literal = static_cast<uint8_t>(in_[0]);
    in_.remove_prefix(1);
    // CaseFolding.txt: beside the ASCII pair, U+017F folds to s (and U+212A to k, which no pattern has).
    const auto fold = [](char32_t c) { return c == 0x17F ? 's' : c >= 'A' && c <= 'Z' ? c + 32 : c; };
    if (ignore_case_) return [=](char32_t c) { return fold(c) == fold(literal); };
    return [=](char32_t c) { return c == literal; };
  }

  std::string_view in_;
  bool ignore_case_ = false;
};

struct Decoded {
  Text code_points;
  std::vector<size_t> offsets;  // of each in bytes, and the end
};

Decoded DecodeAll(std::string_view text) {
  Decoded out;
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Char c = DecodeUtf8(text.substr(at));
    out.offsets.push_back(at);
    out.code_points.push_back(c.kind == Utf8Char::kValid ? c.code_point : kBadByte);
    at += c.kind == Utf8Char::kValid ? c.length : 1;
  }
  out.offsets.push_back(at);
  return out;
}

void SplitFragment(const std::vector<Sequence>& regex, std::string_view text, std::vector<std::string>* pieces) {
  const Decoded decoded = DecodeAll(text);
  for (size_t at = 0; at < decoded.code_points.size();) {
    size_t end = at;
    const auto done = [&](size_t match_end) { return end = match_end, true; };
    CHECK(MatchBranches(regex, decoded.code_points, at, done) && end > at);
    pieces->emplace_back(text.substr(decoded.offsets[at], decoded.offsets[end] - decoded.offsets[at]));
    at = end;
  }
}

}  // namespace

std::vector<std::string> SplitByRegex(SplitPattern pattern, std::string_view text) {
  const auto regex = Parser(pattern == SplitPattern::kLlama3 ? kLlama3SplitRegex : kGpt2SplitRegex).Alternation();
  std::vector<std::string> pieces;
  if (pattern != SplitPattern::kGpt2SingleDigits) {
    SplitFragment(regex, text, &pieces);
    return pieces;
  }
  const Decoded decoded = DecodeAll(text);
  size_t begin = 0;
  for (size_t i = 0; i < decoded.code_points.size(); ++i) {
    if (decoded.code_points[i] == kBadByte || ClassOf(decoded.code_points[i]) != CharClass::kNumber) continue;
    SplitFragment(regex, text.substr(begin, decoded.offsets[i] - begin), &pieces);
    begin = decoded.offsets[i + 1];
    pieces.emplace_back(text.substr(decoded.offsets[i], begin - decoded.offsets[i]));
  }
  SplitFragment(regex, text.substr(begin), &pieces);
  return pieces;
}

}  // namespace altiplano::testing

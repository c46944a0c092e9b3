// A GGUF file's vocabulary, its fields in lines: "m MODEL", "p PRE", "b BOS" (which also asks for it), "TYPE TOKEN"
// with the number of the token's type, "+ LEFT RIGHT" for a merge, and "a" for a token for each printable ASCII
// character.
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "tests/fuzz/tokenizer_properties.h"

namespace altiplano {
namespace {

int32_t Number(std::string_view text) {
  int32_t number = 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

GgufVocabulary Build(std::string_view input) {
  GgufVocabulary gguf;
  gguf.model = "gpt2";
  gguf.pre = "llama-bpe";
  while (!input.empty()) {
    const size_t end = std::min(input.find('\n'), input.size());
    const std::string_view line = input.substr(0, end);
    input.remove_prefix(std::min(end + 1, input.size()));
    const size_t blank = std::min(line.find(' '), line.size());
    const std::string_view what = line.substr(0, blank);
    const std::string value(line.substr(std::min(blank + 1, line.size())));
    if (what == "m") {
      gguf.model = value;
    } else if (what == "p") {
      gguf.pre = value;
    } else if (what == "b") {
      gguf.bos = Number(value);
      gguf.add_bos = true;
    } else if (what == "+") {
      gguf.merges.push_back(value);
    } else if (what == "a") {
      for (char c = '!'; c <= '~'; ++c) gguf.tokens.emplace_back(1, c), gguf.types.push_back(1);
      gguf.tokens.emplace_back("\u0120"), gguf.types.push_back(1);  // the blank
    } else if (what == "n") {
      gguf.types.push_back(1);  // a type too many
    } else {
      gguf.tokens.push_back(value), gguf.types.push_back(Number(what));
    }
  }
  return gguf;
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  const auto made = Tokenizer::FromGguf(Build(std::string_view(reinterpret_cast<const char*>(data), size)));
  if (made.ok()) {
    CheckTokenizer(**made);
  } else {
    CheckRefusal(made.status());
  }
  return 0;
}

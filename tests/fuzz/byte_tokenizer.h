// A tokenizer without a vocabulary: one id a byte, and the chat formats' special tokens by name above them.
#pragma once

#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/text/tokenizer.h"

namespace altiplano {

class ByteTokenizer : public Tokenizer {
 public:
  void Encode(std::string_view text, std::vector<TokenId>* ids) const override {
    for (const char c : text) ids->push_back(static_cast<unsigned char>(c));
  }
  std::string_view TokenBytes(TokenId id) const override {
    if (id < 0 || id >= vocab_size()) return {};
    return id < 256 ? std::string_view(bytes_).substr(static_cast<size_t>(id), 1) : kNames[id - 256];
  }
  bool IsSpecial(TokenId id) const override { return id >= 256 && id < vocab_size(); }
  std::optional<TokenId> Special(std::string_view name) const override {
    for (size_t i = 0; i < std::size(kNames); ++i) {
      if (kNames[i] == name) return static_cast<TokenId>(256 + i);
    }
    return std::nullopt;
  }
  int32_t vocab_size() const override { return 256 + static_cast<int32_t>(std::size(kNames)); }
  std::optional<TokenId> bos() const override { return std::nullopt; }

 private:
  static constexpr std::string_view kNames[] = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                                "<|eot_id|>",        "<|eom_id|>",          "<|python_tag|>",
                                                "<|im_start|>",      "<|im_end|>"};
  static std::string AllBytes() {
    std::string all;
    for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
    return all;
  }
  const std::string bytes_ = AllBytes();
};

}  // namespace altiplano

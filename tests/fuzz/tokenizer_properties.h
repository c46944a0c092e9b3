// What holds for every tokenizer that a loader makes, whatever the file.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/check.h"
#include "server/text/tokenizer.h"

namespace altiplano {

// `text` becomes tokens of the vocabulary, none of them special. Their bytes are the text again, unless it has bytes
// for which there is no token: those vanish.
inline void CheckEncodes(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<TokenId> ids, one;
  tokenizer.Encode(text, &ids);
  std::string decoded;
  for (const TokenId id : ids) {
    CHECK(id >= 0 && id < tokenizer.vocab_size() && !tokenizer.IsSpecial(id));
    CHECK(!tokenizer.TokenBytes(id).empty());
    decoded += tokenizer.TokenBytes(id);
  }
  const bool complete = std::all_of(text.begin(), text.end(), [&](char c) {
    one.clear();
    tokenizer.Encode({&c, 1}, &one);
    return !one.empty();
  });
  if (complete) CHECK(decoded == text);
}

inline void CheckTokenizer(const Tokenizer& tokenizer) {
  CheckEncodes(tokenizer, "");
  CheckEncodes(tokenizer, "Don't  panic: 12345 times <|eot_id|><|begin_of_text|>\n\n  (\xE6\x97\xA5\xE6\x9C\xAC\xFF)");
  std::string all_tokens;
  for (TokenId id = 0; id < tokenizer.vocab_size() && all_tokens.size() < 4096; ++id) {
    all_tokens += tokenizer.TokenBytes(id);
    if (!tokenizer.IsSpecial(id)) continue;
    const auto named = tokenizer.Special(tokenizer.TokenBytes(id));
    CHECK(named && tokenizer.IsSpecial(*named) && tokenizer.TokenBytes(*named) == tokenizer.TokenBytes(id));
  }
  CheckEncodes(tokenizer, all_tokens);
  if (const auto bos = tokenizer.bos()) CHECK(!tokenizer.TokenBytes(*bos).empty());
  CHECK(tokenizer.TokenBytes(-1).empty() && tokenizer.TokenBytes(tokenizer.vocab_size()).empty());
  CHECK(!tokenizer.IsSpecial(-1) && !tokenizer.IsSpecial(tokenizer.vocab_size()));
}

// What a loader says of a file that it does not take.
inline void CheckRefusal(const Status& status) {
  CHECK(status.code() == Code::kInvalidArgument || status.code() == Code::kUnimplemented);
  CHECK(!status.message().empty() && status.message().size() <= 600);
}

}  // namespace altiplano

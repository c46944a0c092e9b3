// IncrementalDecoder: token ids in, whole code points out. Bytes of an unfinished code point (at most 3) are held back;
// bytes that can never become valid turn into U+FFFD, one for each maximal bad subpart (Unicode 15, section 3.9).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "server/text/tokenizer.h"

namespace altiplano {

class IncrementalDecoder {
 public:
  // keep_special: special tokens appear as their names; otherwise they add nothing.
  IncrementalDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool keep_special);

  std::string Push(TokenId id);
  std::string Flush();  // the end: a held-back tail becomes U+FFFD

 private:
  std::string Drain(bool at_end);

  std::shared_ptr<const Tokenizer> tokenizer_;
  bool keep_special_;
  std::string pending_;
};

}  // namespace altiplano

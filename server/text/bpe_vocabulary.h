// The tables of a byte-pair encoding: token ids and their bytes both ways, and merges. Filled by one loader, then only
// read. Flat hash tables of our own: encoding is nothing but look-ups, and loading inserts half a million entries.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"
#include "server/base/types.h"

namespace altiplano {

// Ids from here on are refused as nonsense: tables are dense in the id. 32 times Llama 3's vocabulary.
inline constexpr int64_t kMaxVocabularySize = 1 << 22;

class BpeVocabulary {
 public:
  enum class Kind : uint8_t {
    kNone,     // no such token
    kText,     // encoding may produce it
    kDecode,   // has bytes, but no text leads to it
    kSpecial,  // control token: its bytes are its name
  };

  explicit BpeVocabulary(size_t expected_tokens);

  // INVALID_ARGUMENT: id out of range or taken, no bytes, or (kText) another token has the same bytes.
  Status Add(int64_t id, std::string_view bytes, Kind kind);

  TokenId Find(std::string_view bytes) const;  // a kText token, or -1
  std::string_view Bytes(TokenId id) const {   // "" for ids that are not there
    if (id < 0 || id >= size()) return {};
    const Token& token = tokens_[static_cast<size_t>(id)];
    return std::string_view(blob_).substr(token.offset, token.length);
  }
  Kind kind(TokenId id) const { return id < 0 || id >= size() ? Kind::kNone : tokens_[static_cast<size_t>(id)].kind; }
  int32_t size() const { return static_cast<int32_t>(tokens_.size()); }  // highest id + 1
  size_t max_text_bytes() const { return max_text_bytes_; }              // of the longest kText token

 private:
  struct Token {
    uint32_t offset = 0;
    uint32_t length = 0;
    Kind kind = Kind::kNone;
  };
  struct Slot {
    uint32_t tag = 0;  // upper hash bits: spares most looks at the bytes
    TokenId id = -1;
  };

  void Insert(uint64_t hash, TokenId id);
  void Grow();

  std::string blob_;  // all tokens' bytes
  std::vector<Token> tokens_;
  std::vector<Slot> slots_;  // power of two, at most half full, linear probing
  size_t used_ = 0;
  size_t max_text_bytes_ = 0;
};

// Merges: which two adjacent tokens become one, the lower rank first.
class BpeMerges {
 public:
  struct Merge {
    uint32_t rank;
    TokenId id;  // what the two become
  };

  explicit BpeMerges(size_t count);  // the most merges it will hold

  bool Add(TokenId left, TokenId right, Merge merge);  // false: the pair is there already
  const Merge* Find(TokenId left, TokenId right) const;

 private:
  struct Slot {
    uint64_t pair = kEmpty;
    Merge merge = {};
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};

  size_t SlotOf(uint64_t pair) const;  // where the pair is or would be

  std::vector<Slot> slots_;
};

// GPT-2's spelling of bytes in vocabulary files: printable Latin-1 stands for itself, the other 68 bytes are U+0100
// upwards. Appends the bytes; false (and nothing certain appended) when `spelled` has any other character.
bool AppendSpelledBytes(std::string_view spelled, std::string* bytes);

// "\"abc\"" for messages: at most 64 bytes of a token, with what is not printable ASCII as \xNN.
std::string QuoteToken(std::string_view bytes);

}  // namespace altiplano

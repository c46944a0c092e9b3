#include "server/text/bpe_vocabulary.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

// Multiply and fold: the 128-bit product's halves xored. Constants: odd, random.
uint64_t Mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
constexpr uint64_t kMultiplierA = 0x9E3779B97F4A7C15;
constexpr uint64_t kMultiplierB = 0xD6E8FEB86659FD93;

template <typename T>
uint64_t Load(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Most keys are shorter than 16 bytes: two overlapping loads see all of them.
uint64_t HashBytes(std::string_view bytes) {
  const char* p = bytes.data();
  size_t n = bytes.size();
  uint64_t hash = n * kMultiplierA;
  for (; n > 16; p += 16, n -= 16)
    hash = Mix(Load<uint64_t>(p) ^ kMultiplierA ^ hash, Load<uint64_t>(p + 8) ^ kMultiplierB);
  uint64_t a = 0, b = 0;
  if (n >= 8) {
    a = Load<uint64_t>(p), b = Load<uint64_t>(p + n - 8);
  } else if (n >= 4) {
    a = Load<uint32_t>(p), b = Load<uint32_t>(p + n - 4);
  } else if (n > 0) {
    a = Load<uint8_t>(p) << 16 | Load<uint8_t>(p + n / 2) << 8 | Load<uint8_t>(p + n - 1);
  }
  return Mix(a ^ kMultiplierB ^ hash, b ^ kMultiplierA);
}

}  // namespace

BpeVocabulary::BpeVocabulary(size_t expected_tokens) {
  tokens_.reserve(expected_tokens);
  blob_.reserve(expected_tokens * 8);
  slots_.resize(std::bit_ceil(std::max<size_t>(expected_tokens, 512) * 2));
}

Status BpeVocabulary::Add(int64_t id, std::string_view bytes, Kind kind) {
  const auto error = [&](const auto&... what) {
    return Status(Code::kInvalidArgument, StrCat("token ", QuoteToken(bytes), ": ", what...));
  };
  if (id < 0 || id >= kMaxVocabularySize) return error("id ", id, " is outside [0, ", kMaxVocabularySize, ")");
  if (bytes.empty()) return error("id ", id, " has no bytes");
  if (bytes.size() >= (1u << 31) || blob_.size() >= (1u << 31)) return error("the vocabulary exceeds 2 GiB");
  const auto token_id = static_cast<TokenId>(id);
  if (this->kind(token_id) != Kind::kNone) return error("id ", id, " is taken by token ", QuoteToken(Bytes(token_id)));
  if (kind == Kind::kText) {
    if (const TokenId other = Find(bytes); other >= 0) return error("has two ids, ", other, " and ", id);
  }

  if (token_id >= size()) tokens_.resize(static_cast<size_t>(token_id) + 1);
  tokens_[static_cast<size_t>(token_id)] = {static_cast<uint32_t>(blob_.size()), static_cast<uint32_t>(bytes.size()),
                                            kind};
  blob_.append(bytes);
  if (kind == Kind::kText) {
    if (++used_ * 2 > slots_.size()) Grow();
    Insert(HashBytes(bytes), token_id);
    max_text_bytes_ = std::max(max_text_bytes_, bytes.size());
  }
  return OkStatus();
}

TokenId BpeVocabulary::Find(std::string_view bytes) const {
  const uint64_t hash = HashBytes(bytes);
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash & mask;; i = (i + 1) & mask) {
    const Slot& slot = slots_[i];
    if (slot.id < 0) return -1;
    if (slot.tag == static_cast<uint32_t>(hash >> 32) && Bytes(slot.id) == bytes) return slot.id;
  }
}

void BpeVocabulary::Insert(uint64_t hash, TokenId id) {
  const size_t mask = slots_.size() - 1;
  size_t i = hash & mask;
  while (slots_[i].id >= 0) i = (i + 1) & mask;
  slots_[i] = {static_cast<uint32_t>(hash >> 32), id};
}

void BpeVocabulary::Grow() {
  std::vector<Slot> old(slots_.size() * 2);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.id >= 0) Insert(HashBytes(Bytes(slot.id)), slot.id);
  }
}

BpeMerges::BpeMerges(size_t count) : slots_(std::bit_ceil(std::max<size_t>(count, 8) * 3 / 2 + 1)) {}

size_t BpeMerges::SlotOf(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  size_t i = Mix(pair ^ kMultiplierB, kMultiplierA) & mask;
  while (slots_[i].pair != pair && slots_[i].pair != kEmpty) i = (i + 1) & mask;
  return i;
}

bool BpeMerges::Add(TokenId left, TokenId right, Merge merge) {
  CHECK(left >= 0 && right >= 0);
  const uint64_t pair = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  Slot& slot = slots_[SlotOf(pair)];
  if (slot.pair != kEmpty) return false;
  slot = {pair, merge};
  return true;
}

const BpeMerges::Merge* BpeMerges::Find(TokenId left, TokenId right) const {
  const uint64_t pair = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  const Slot& slot = slots_[SlotOf(pair)];
  return slot.pair == pair ? &slot.merge : nullptr;
}

namespace {

// Byte spelled by each code point below 0x144, or -1.
constexpr std::array<int16_t, 0x144> kSpelledByte = [] {
  std::array<int16_t, 0x144> table{};
  table.fill(-1);
  int16_t next = 0x100;
  for (int16_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    table[static_cast<size_t>(printable ? b : next++)] = b;
  }
  return table;
}();

}  // namespace

bool AppendSpelledBytes(std::string_view spelled, std::string* bytes) {
  for (size_t i = 0; i < spelled.size(); ++i) {
    uint32_t code_point = static_cast<uint8_t>(spelled[i]);
    if (code_point >= 0x80) {  // two-byte UTF-8 reaches past U+0143
      if ((code_point & 0xE0) != 0xC0 || i + 1 == spelled.size()) return false;
      code_point = (code_point & 0x1F) << 6 | (static_cast<uint8_t>(spelled[++i]) & 0x3F);
    }
    if (code_point >= kSpelledByte.size() || kSpelledByte[code_point] < 0) return false;
    bytes->push_back(static_cast<char>(kSpelledByte[code_point]));
  }
  return true;
}

std::string QuoteToken(std::string_view bytes) {
  std::string out = "\"";
  for (const char c : bytes.substr(0, 64)) {
    if (c >= 0x20 && c < 0x7F && c != '"' && c != '\\') {
      out += c;
    } else {
      out += StrFormat("\\x%02x", static_cast<unsigned>(static_cast<uint8_t>(c)));
    }
  }
  return out + (bytes.size() > 64 ? "...\"" : "\"");
}

}  // namespace altiplano

// The fake model: what a sequence's tokens must be, worked out from the request alone. The fake executor computes the
// same thing through the block tables.
//
// Position p holds a value v(p) = Mix(token, p, A(p - 1)), as a key or value vector depends on everything before it;
// A(p) folds v(0) ... v(p), as attention reads all of them. The next token is a hash of A. A(-1) depends on who may
// share a prefix with whom, so that a block shared across tenants is a wrong answer, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "server/scheduler/request.h"

namespace altiplano::sim {

inline uint64_t Mix(uint64_t a, uint64_t b) {  // splitmix64's finisher over a combination of both
  uint64_t z = a * 0x9e3779b97f4a7c15u + b + 0x632be59bd9b4e019u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline uint64_t Mix(uint64_t h, std::string_view text) {
  h = Mix(h, text.size());
  for (char c : text) h = Mix(h, static_cast<uint8_t>(c));
  return h;
}

struct Random {
  uint64_t state;
  uint64_t Next() { return state = Mix(state, 1); }
  int32_t Below(int32_t n) { return static_cast<int32_t>(Next() % static_cast<uint64_t>(n)); }
  int32_t Between(int32_t low, int32_t high) { return low + Below(high - low + 1); }  // both included
  bool Chance(double p) { return static_cast<double>(Next() >> 11) * 0x1p-53 < p; }
};

struct FakeModel {
  int32_t vocab = 50;
  std::vector<TokenId> eos_ids;

  static uint64_t Root(const Request& request) {
    uint64_t root = Mix(Mix(0, request.tenant), request.cache_salt);
    return request.bypass_prefix_cache ? Mix(root, request.id) : root;
  }
  static uint64_t Value(TokenId token, int32_t position, uint64_t attention) {
    return Mix(Mix(attention, static_cast<uint64_t>(token)), static_cast<uint64_t>(position));
  }
  static uint64_t Attend(uint64_t attention, uint64_t value) { return Mix(attention, value); }

  bool IsEos(const Request& request, TokenId token) const {
    return !request.stop.ignore_eos && std::ranges::find(eos_ids, token) != eos_ids.end();
  }
  bool IsStop(const Request& request, TokenId token) const {
    return IsEos(request, token) || std::ranges::find(request.stop.token_ids, token) != request.stop.token_ids.end();
  }
  TokenId Next(const Request& request, uint32_t sequence, int32_t position, uint64_t attention,
               const std::vector<TokenId>& history, bool ban_stops) const {
    uint64_t h = Mix(Mix(Mix(attention, request.sampling.seed), sequence), static_cast<uint64_t>(position));
    if (request.sampling.NeedsHistory()) {
      for (TokenId token : history) h = Mix(h, static_cast<uint64_t>(token));
    }
    TokenId token = static_cast<TokenId>(h % static_cast<uint64_t>(vocab));
    while (ban_stops && IsStop(request, token)) {
      h = Mix(h, 7);
      token = static_cast<TokenId>(h % static_cast<uint64_t>(vocab));
    }
    return token;
  }
  static float Score(uint64_t attention, TokenId token) {
    return -static_cast<float>(Mix(attention, static_cast<uint64_t>(token)) % 1000) / 100;
  }
};

// What one sequence must produce, token by token.
class SequenceOracle {
 public:
  SequenceOracle(const FakeModel& model, const Request& request, uint32_t sequence, int32_t limit)
      : model_(model), request_(request), sequence_(sequence), limit_(limit), attention_(FakeModel::Root(request)) {
    for (TokenId token : request.prompt) Take(token);
  }

  struct Step {
    TokenId token;
    FinishReason finish;
  };
  Step Next() {
    const auto count = static_cast<int32_t>(generated_.size());
    const bool ban = count < request_.stop.min_new_tokens;
    const TokenId token = model_.Next(request_, sequence_, position_, attention_, generated_, ban);
    FinishReason finish = FinishReason::kNone;
    if (position_ + 1 >= limit_) finish = FinishReason::kLength;
    if (!ban && model_.IsStop(request_, token)) finish = FinishReason::kStop;
    if (!ban && model_.IsEos(request_, token)) finish = FinishReason::kEos;
    generated_.push_back(token);
    Take(token);
    return {token, finish};
  }

 private:
  void Take(TokenId token) {
    attention_ = FakeModel::Attend(attention_, FakeModel::Value(token, position_++, attention_));
  }

  const FakeModel& model_;
  const Request& request_;
  const uint32_t sequence_;
  const int32_t limit_;
  int32_t position_ = 0;
  uint64_t attention_;
  std::vector<TokenId> generated_;
};

}  // namespace altiplano::sim

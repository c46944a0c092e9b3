#include "server/engine/replica_router.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace altiplano {

namespace {

// Submit runs where all streams are written: a longer prompt is known by its beginning.
constexpr size_t kMaxChain = 128;
// A sequence that decodes slows others down about as much as this many tokens of prompt.
constexpr int64_t kSequenceTokens = 128;

}  // namespace

size_t ReplicaRouter::HashOf::operator()(const BlockHash& hash) const {
  size_t value;
  std::memcpy(&value, hash.data(), sizeof value);
  return value;
}

ReplicaRouter::ReplicaRouter(int replicas, int32_t block_size, int32_t num_blocks)
    : block_size_(block_size), num_blocks_(static_cast<size_t>(num_blocks)), replicas_(static_cast<size_t>(replicas)) {}

ReplicaRouter::Route ReplicaRouter::Find(const Request& request) const {
  Route route;
  const auto block = static_cast<size_t>(block_size_);
  if (!request.bypass_prefix_cache) {
    BlockHash parent = RootHash(request.tenant, request.cache_salt);
    const size_t blocks = std::min(kMaxChain, request.prompt.size() / block);
    for (size_t i = 0; i < blocks; ++i) {
      parent = ChainHash(parent, std::span(request.prompt).subspan(i * block, block));
      route.chain.push_back(parent);
    }
  }
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  std::vector<int64_t> cost;
  for (const Replica& replica : replicas_) {
    cost.push_back(replica.prompt_tokens + kSequenceTokens * replica.sequences + prompt_tokens -
                   CachedTokens(replica, route.chain));
  }
  route.order.resize(replicas_.size());
  std::iota(route.order.begin(), route.order.end(), 0);
  std::stable_sort(route.order.begin(), route.order.end(),
                   [&](int a, int b) { return cost[static_cast<size_t>(a)] < cost[static_cast<size_t>(b)]; });
  return route;
}

int64_t ReplicaRouter::CachedTokens(const Replica& replica, std::span<const BlockHash> chain) const {
  int64_t tokens = 0;
  for (const BlockHash& hash : chain) {
    if (replica.cached.count(hash) == 0) break;
    tokens += block_size_;
  }
  return tokens;
}

ReplicaRouter::Work ReplicaRouter::Sent(const Request& request, const Route& route, int index) {
  Replica& replica = replicas_[static_cast<size_t>(index)];
  const Work work{index, static_cast<int64_t>(request.prompt.size()) - CachedTokens(replica, route.chain),
                  request.num_sequences};
  replica.prompt_tokens += work.prompt_tokens;
  replica.sequences += work.sequences;
  // From the last block to the first: a chain without its beginning is of no use, so that is forgotten last.
  for (auto hash = route.chain.rbegin(); hash != route.chain.rend(); ++hash) {
    if (auto known = replica.cached.find(*hash); known != replica.cached.end()) {
      replica.by_use.splice(replica.by_use.begin(), replica.by_use, known->second);
    } else {
      replica.by_use.push_front(*hash);
      replica.cached.emplace(*hash, replica.by_use.begin());
    }
  }
  while (replica.cached.size() > num_blocks_) {
    replica.cached.erase(replica.by_use.back());
    replica.by_use.pop_back();
  }
  return work;
}

void ReplicaRouter::Computed(Work* work) {
  replicas_[static_cast<size_t>(work->replica)].prompt_tokens -= work->prompt_tokens;
  work->prompt_tokens = 0;
}

void ReplicaRouter::Ended(Work* work) {
  Computed(work);
  replicas_[static_cast<size_t>(work->replica)].sequences -= work->sequences;
  work->sequences = 0;
}

void ReplicaRouter::Forget(int index) {
  Replica& replica = replicas_[static_cast<size_t>(index)];
  replica.cached.clear();
  replica.by_use.clear();
}

}  // namespace altiplano

// ReplicaRouter: which of several equal replicas a request is best sent to: one that has the beginning of its prompt
// cached, unless others have so much less to do that computing it again is sooner done.
//
// No threads and no clock: the same calls in the same order choose the same replicas.
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

#include "server/scheduler/prefix_cache.h"
#include "server/scheduler/request.h"

namespace altiplano {

class ReplicaRouter {
 public:
  // Each replica's cache has num_blocks blocks of block_size tokens; 0: there is no cache.
  ReplicaRouter(int replicas, int32_t block_size, int32_t num_blocks);

  struct Route {
    std::vector<int> order;        // all replicas, the best first; the lower index among equals
    std::vector<BlockHash> chain;  // of the prompt's leading blocks
  };
  Route Find(const Request& request) const;

  // What a replica has been given to do, until Computed and Ended.
  struct Work {
    int replica = 0;
    int64_t prompt_tokens = 0;  // that its cache does not have
    int32_t sequences = 0;
  };
  Work Sent(const Request& request, const Route& route, int replica);
  void Computed(Work* work);  // the prompt has been
  void Ended(Work* work);
  // Its cache holds nothing any more.
  void Forget(int replica);

 private:
  struct HashOf {
    size_t operator()(const BlockHash& hash) const;
  };
  struct Replica {
    int64_t prompt_tokens = 0;  // sent and not computed yet
    int64_t sequences = 0;      // sent and not ended
    // What its cache may hold, as far as this class knows: it never hears of an eviction, but forgets as many blocks
    // as the cache cannot hold, those used longest ago first.
    std::list<BlockHash> by_use;  // the last used first
    std::unordered_map<BlockHash, std::list<BlockHash>::iterator, HashOf> cached;
  };
  int64_t CachedTokens(const Replica& replica, std::span<const BlockHash> chain) const;

  const int32_t block_size_;
  const size_t num_blocks_;
  std::vector<Replica> replicas_;
};

}  // namespace altiplano

// StopMatcher: finds the first stop string in streamed text, holding back what could still become one. Linear in the
// text whatever the stops are. One stream, one thread at a time.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace altiplano {

class StopMatcher {
 public:
  // include_match: the matched stop string is part of the output. Empty stops never match.
  StopMatcher(std::vector<std::string> stops, bool include_match);

  // Text that is certain now. After a match (matched() >= 0) further text is ignored and "" returned.
  // The match that ends first wins; of several ending at the same byte, the longest.
  std::string Push(std::string_view text);
  std::string Flush();  // the end without a match: what was held back

  int matched() const { return matched_; }  // index into `stops`, or -1
  const std::string& stop(int i) const { return stops_[static_cast<size_t>(i)]; }

 private:
  // A trie of the stops with failure links (Aho, Corasick 1975). The state is the longest suffix of the text so far
  // that is the beginning of a stop, so it is the text held back: nothing else needs to be stored.
  struct Node {
    int32_t stop = -1;         // one that begins with the way here
    int32_t depth = 0;         // bytes from the root
    int32_t fail = 0;          // the longest proper suffix that is a node
    int32_t match = -1;        // the longest stop that ends here
    int32_t first_child = -1;  // children as a list; the root's are in root_
    int32_t next_sibling = -1;
    char byte = 0;  // the edge from the parent
  };

  void Insert(int stop);
  void LinkFailures();
  int32_t Child(int32_t node, char byte) const;  // -1: none
  int32_t Next(int32_t node, char byte) const;

  std::vector<std::string> stops_;
  bool include_match_;
  int matched_ = -1;
  std::vector<Node> nodes_;
  std::array<int32_t, 256> root_;  // children of node 0, the root; 0: none
  int32_t state_ = 0;
};

}  // namespace altiplano

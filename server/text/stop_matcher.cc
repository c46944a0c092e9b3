#include "server/text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace altiplano {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_match)
    : stops_(std::move(stops)), include_match_(include_match), nodes_(1) {
  root_.fill(0);
  for (size_t i = 0; i < stops_.size(); ++i) Insert(static_cast<int>(i));
  LinkFailures();
}

void StopMatcher::Insert(int stop) {
  int32_t at = 0;
  for (const char byte : stops_[static_cast<size_t>(stop)]) {
    int32_t child = Child(at, byte);
    if (child < 0) {
      child = static_cast<int32_t>(nodes_.size());
      Node& parent = nodes_[static_cast<size_t>(at)];
      const Node node{.stop = stop, .depth = parent.depth + 1, .next_sibling = parent.first_child, .byte = byte};
      parent.first_child = child;
      if (at == 0) root_[static_cast<uint8_t>(byte)] = child;
      nodes_.push_back(node);
    }
    at = child;
  }
  Node& end = nodes_[static_cast<size_t>(at)];
  if (at != 0 && end.match < 0) end.match = stop;  // of equal stops the first
}

void StopMatcher::LinkFailures() {
  std::vector<int32_t> order{0};  // breadth first: failure links lead to shallower nodes
  for (size_t i = 0; i < order.size(); ++i) {
    for (int32_t c = nodes_[static_cast<size_t>(order[i])].first_child; c >= 0;) {
      Node& child = nodes_[static_cast<size_t>(c)];
      if (order[i] != 0) child.fail = Next(nodes_[static_cast<size_t>(order[i])].fail, child.byte);
      if (child.match < 0) child.match = nodes_[static_cast<size_t>(child.fail)].match;
      order.push_back(c);
      c = child.next_sibling;
    }
  }
}

int32_t StopMatcher::Child(int32_t node, char byte) const {
  if (node == 0) {
    const int32_t child = root_[static_cast<uint8_t>(byte)];
    return child == 0 ? -1 : child;
  }
  int32_t child = nodes_[static_cast<size_t>(node)].first_child;
  while (child >= 0 && nodes_[static_cast<size_t>(child)].byte != byte) {
    child = nodes_[static_cast<size_t>(child)].next_sibling;
  }
  return child;
}

int32_t StopMatcher::Next(int32_t node, char byte) const {
  // Each step up gives back depth that an earlier byte earned, so a stream costs at most two steps a byte.
  for (;; node = nodes_[static_cast<size_t>(node)].fail) {
    if (const int32_t child = Child(node, byte); child >= 0) return child;
    if (node == 0) return 0;
  }
}

std::string StopMatcher::Push(std::string_view text) {
  if (matched_ >= 0) return "";
  const Node before = nodes_[static_cast<size_t>(state_)];
  const auto held = static_cast<size_t>(before.depth);
  size_t certain = 0;  // bytes of (held + text) to give out
  size_t consumed = 0;
  while (consumed < text.size() && matched_ < 0) {
    state_ = Next(state_, text[consumed++]);
    matched_ = nodes_[static_cast<size_t>(state_)].match;
  }
  if (matched_ >= 0) {
    certain = held + consumed - (include_match_ ? 0 : stop(matched_).size());
    state_ = 0;
  } else {
    certain = held + consumed - static_cast<size_t>(nodes_[static_cast<size_t>(state_)].depth);
  }
  if (certain == 0) return "";
  // What was held is the beginning of a stop: only the part that goes out is copied, or long stops would cost n^2.
  std::string out = held > 0 ? stop(before.stop).substr(0, std::min(certain, held)) : "";
  if (certain > held) out += text.substr(0, certain - held);
  return out;
}

std::string StopMatcher::Flush() {
  const Node& node = nodes_[static_cast<size_t>(state_)];
  state_ = 0;
  return node.depth > 0 ? stop(node.stop).substr(0, static_cast<size_t>(node.depth)) : "";
}

}  // namespace altiplano

// StopMatcher: finds the first stop string in streamed text, holding back what could still become one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace altiplano {

class StopMatcher {
 public:
  // include_match: the matched stop string is part of the output.
  StopMatcher(std::vector<std::string> stops, bool include_match);

  // Text that is certain now. After a match (matched() >= 0) further text is ignored and "" returned.
  // The match that ends first wins; of several ending at the same byte, the longest.
  std::string Push(std::string_view text);
  std::string Flush();  // the end without a match: what was held back

  int matched() const { return matched_; }  // index into `stops`, or -1
  const std::string& stop(int i) const { return stops_[static_cast<size_t>(i)]; }

 private:
  std::vector<std::string> stops_;
  bool include_match_;
  int matched_ = -1;
  std::string held_;
};

}  // namespace altiplano

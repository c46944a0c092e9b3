// How nodes show each other that they know the group's secret without sending it. Both sides draw a nonce; each proves
// itself by an HMAC over both, over who it is and over what it says of itself.
#pragma once

#include <string>
#include <string_view>

#include "server/base/status.h"

namespace altiplano::cluster {

// 256 random bits, in hexadecimal digits.
std::string RandomToken();

struct Exchange {
  std::string follower_nonce, leader_nonce;
  int node = 0;              // of the follower
  std::string data_address;  // of the follower: nobody else's is believed
};
std::string LeaderProof(std::string_view secret, const Exchange& exchange);
std::string FollowerProof(std::string_view secret, const Exchange& exchange);

// The file's contents without white space at the end. OUT_OF_RANGE when they cannot be read, or are shorter than 16
// bytes.
StatusOr<std::string> ReadSecret(const std::string& path);

}  // namespace altiplano::cluster

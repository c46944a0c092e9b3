#include "server/cluster/secret.h"

#include <random>

#include "server/base/hmac.h"
#include "server/base/read_file.h"
#include "server/base/strings.h"

namespace altiplano::cluster {

namespace {

constexpr size_t kShortestSecret = 16, kLongestSecret = 1 << 16;

std::string Proof(std::string_view secret, std::string_view role, const Exchange& exchange) {
  std::string message(role);
  // With their lengths: no two exchanges give the same text.
  for (const std::string& part :
       {exchange.follower_nonce, exchange.leader_nonce, StrCat(exchange.node), exchange.data_address}) {
    message += StrCat("/", part.size(), ":", part);
  }
  const Sha256Digest digest = HmacSha256(secret, message);
  return {digest.begin(), digest.end()};
}

}  // namespace

std::string RandomToken() {
  std::random_device random;
  std::string token;
  for (int i = 0; i < 8; ++i) token += StrFormat("%08x", random());
  return token;
}

std::string LeaderProof(std::string_view secret, const Exchange& exchange) {
  return Proof(secret, "leader", exchange);
}
std::string FollowerProof(std::string_view secret, const Exchange& exchange) {
  return Proof(secret, "follower", exchange);
}

StatusOr<std::string> ReadSecret(const std::string& path) {
  auto secret = ReadFile(path, kLongestSecret);
  if (!secret.ok()) return Status(Code::kOutOfRange, StrCat("--node-secret-file: ", secret.status().message()));
  secret->erase(secret->find_last_not_of(" \t\r\n") + 1);
  if (secret->size() < kShortestSecret) {
    return Status(Code::kOutOfRange, StrCat("--node-secret-file ", path, " holds ", secret->size(),
                                            " bytes; a secret has at least ", kShortestSecret));
  }
  return secret;
}

}  // namespace altiplano::cluster

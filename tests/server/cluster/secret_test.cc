#include "server/cluster/secret.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

namespace altiplano::cluster {
namespace {

using ::testing::HasSubstr;

TEST(Secret, ProofsDependOnEverything) {
  const Exchange exchange{.follower_nonce = "f", .leader_nonce = "l", .node = 1, .data_address = "10.0.0.2:1"};
  std::set<std::string> proofs = {LeaderProof("secret", exchange), FollowerProof("secret", exchange),
                                  FollowerProof("other", exchange)};
  Exchange other = exchange;
  other.follower_nonce = "g";
  proofs.insert(FollowerProof("secret", other));
  other = exchange;
  other.leader_nonce = "m";
  proofs.insert(FollowerProof("secret", other));
  other = exchange;
  other.node = 2;
  proofs.insert(FollowerProof("secret", other));
  other = exchange;
  other.data_address = "10.0.0.3:1";
  proofs.insert(FollowerProof("secret", other));
  EXPECT_EQ(proofs.size(), 7u);
  EXPECT_EQ(FollowerProof("secret", exchange), FollowerProof("secret", exchange));
  EXPECT_NE(RandomToken(), RandomToken());
}

TEST(Secret, IsAFileOfAtLeast16Bytes) {
  const std::string path = std::filesystem::path(::testing::TempDir()) / "node_secret";
  EXPECT_EQ(ReadSecret(path).status().code(), Code::kOutOfRange);
  EXPECT_THAT(ReadSecret(path).status().message(), HasSubstr("--node-secret-file: cannot open " + path));
  EXPECT_EQ(ReadSecret(::testing::TempDir()).status().code(), Code::kOutOfRange);
  EXPECT_THAT(ReadSecret(::testing::TempDir()).status().message(), HasSubstr("Is a directory"));
  std::ofstream(path) << "0123456789abcdef\r\n";
  EXPECT_EQ(ReadSecret(path).value(), "0123456789abcdef");
  std::ofstream(path) << "0123456789abcde \n";
  EXPECT_THAT(ReadSecret(path).status().message(), HasSubstr("holds 15 bytes"));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace altiplano::cluster

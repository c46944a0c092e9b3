#include "server/base/sha256.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/strings.h"

namespace altiplano {
namespace {

std::string HashOf(std::string_view text) {
  Sha256 sha;
  sha.Update(text.data(), text.size());
  return Hex(sha.Finish());
}

// NIST's examples for FIPS 180-4 (one block, two blocks, long message) and CAVP's empty message.
TEST(Sha256, MatchesNistExamples) {
  EXPECT_EQ(HashOf(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(HashOf("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(HashOf("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(HashOf("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmno"
                   "pqrstnopqrstu"),
            "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
  EXPECT_EQ(HashOf(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, PiecesGiveTheSameDigestAsTheWhole) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (size_t size : {0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128, 299}) {
    const std::string whole = HashOf(text.substr(0, size));
    for (size_t piece : {1, 3, 63, 64, 65}) {
      Sha256 sha;
      for (size_t at = 0; at < size; at += piece) sha.Update(text.data() + at, std::min(piece, size - at));
      EXPECT_EQ(Hex(sha.Finish()), whole) << size << " bytes by " << piece;
    }
  }
}

TEST(Sha256, InstructionsAgreeWithPlainCode) {
  if (!internal::HasShaInstructions()) GTEST_SKIP() << "this CPU has no SHA instructions";
  std::mt19937_64 random(1);
  for (size_t blocks : {1, 2, 5}) {
    std::vector<uint8_t> data(64 * blocks);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    internal::Sha256State portable, native;
    for (uint32_t& word : portable) word = static_cast<uint32_t>(random());
    native = portable;
    internal::Sha256CompressPortable(portable, data.data(), blocks);
    internal::Sha256CompressNative(native, data.data(), blocks);
    EXPECT_EQ(portable, native);
  }
}

}  // namespace
}  // namespace altiplano

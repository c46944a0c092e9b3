// Links between two ranks: order, sizes, independence of the two ways, and an end for both when one fails.
#include "kernels/comm/link.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <future>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace altiplano {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

struct Ends {
  std::unique_ptr<Link> first, second;
};
struct Transport {
  std::string name;
  std::function<Ends(milliseconds patience)> make;
};

// Every kind of link; the ends belong to ranks 3 and 5.
std::vector<Transport> Transports() {
  return {
      {"InProcess",
       [](milliseconds patience) {
         auto [first, second] = MakeInProcessLink("rank 3", "rank 5", patience);
         return Ends{std::move(first), std::move(second)};
       }},
      {"Socket", [](milliseconds patience) {
         int sockets[2];
         EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
         return Ends{MakeSocketLink(sockets[0], "rank 5", patience), MakeSocketLink(sockets[1], "rank 3", patience)};
       }}};
}

class LinkTest : public ::testing::TestWithParam<Transport> {
 protected:
  Ends Make(milliseconds patience = std::chrono::seconds(60)) { return GetParam().make(patience); }
  const std::unique_ptr<Stream> first_stream_ = Stream::Cpu(1), second_stream_ = Stream::Cpu(1);
};

TensorView View(std::vector<float>& values) {
  return TensorView::Make(values.data(), DType::kF32, {static_cast<int64_t>(values.size())});
}

TEST_P(LinkTest, TensorsArriveInOrderBothWaysAtOnce) {
  Ends ends = Make();
  std::mt19937 random(5);
  std::vector<size_t> sizes;
  for (int i = 0; i < 200; ++i) sizes.push_back(random() % 5000);
  sizes.push_back(3 << 20);  // more than any buffer of a system
  auto run = [&](Link& link, Stream& stream, float mine, float others) {
    std::vector<float> out, in;
    for (size_t i = 0; i < sizes.size(); ++i) {
      out.assign(sizes[i], mine);
      std::iota(out.begin(), out.end(), mine + static_cast<float>(i));
      in.assign(sizes[i], -1);
      // One that sends before it receives and one that does the other: neither way waits for the other one.
      const bool send_first = mine < others;
      if (send_first && !link.Send(stream, View(out))) return false;
      if (!link.Receive(stream, View(in))) return false;
      if (!send_first && !link.Send(stream, View(out))) return false;
      for (size_t k = 0; k < in.size(); ++k) {
        if (in[k] != others + static_cast<float>(i + k)) return false;
      }
    }
    return true;
  };
  auto other = std::async(std::launch::async, [&] { return run(*ends.second, *second_stream_, 2e6f, 1e6f); });
  EXPECT_TRUE(run(*ends.first, *first_stream_, 1e6f, 2e6f)) << ends.first->error();
  EXPECT_TRUE(other.get()) << ends.second->error();
}

TEST_P(LinkTest, SendDoesNotWaitForTheReceiver) {
  Ends ends = Make();
  std::vector<float> x = {1, 2, 3};
  ASSERT_TRUE(ends.first->Send(*first_stream_, View(x)));
  x = {4, 5, 6};  // free to be changed
  ASSERT_TRUE(ends.first->Send(*first_stream_, View(x)));
  std::vector<float> in(3);
  ASSERT_TRUE(ends.second->Receive(*second_stream_, View(in)));
  EXPECT_THAT(in, ::testing::ElementsAre(1, 2, 3));
  ASSERT_TRUE(ends.second->Receive(*second_stream_, View(in)));
  EXPECT_THAT(in, ::testing::ElementsAre(4, 5, 6));
}

TEST_P(LinkTest, AnAbortWakesWhoeverWaitsAndBothEndsKeepTheFirstReason) {
  Ends ends = Make();
  std::vector<float> in(4);
  auto waits = std::async(std::launch::async, [&] { return ends.second->Receive(*second_stream_, View(in)); });
  std::this_thread::sleep_for(milliseconds(20));
  ends.first->Abort("the fuse is blown");
  ends.first->Abort("later");
  EXPECT_FALSE(waits.get());
  EXPECT_EQ(ends.first->error(), "the fuse is blown");
  EXPECT_NE(ends.second->error(), "");
  EXPECT_FALSE(ends.first->Send(*first_stream_, View(in)));
  EXPECT_FALSE(ends.second->Receive(*second_stream_, View(in)));
}

TEST_P(LinkTest, AnEndThatLeavesEndsTheLink) {
  Ends ends = Make(std::chrono::seconds(20));  // not what ends it
  std::vector<float> in(4);
  auto waits = std::async(std::launch::async, [&] { return ends.second->Receive(*second_stream_, View(in)); });
  std::this_thread::sleep_for(milliseconds(20));
  ends.first.reset();
  EXPECT_FALSE(waits.get());
  EXPECT_THAT(ends.second->error(), HasSubstr("left"));
}

TEST_P(LinkTest, OneThatDoesNotComeIsNamedWhenPatienceEnds) {
  Ends ends = Make(milliseconds(100));
  std::vector<float> in(4);
  EXPECT_FALSE(ends.second->Receive(*second_stream_, View(in)));
  EXPECT_THAT(ends.second->error(), HasSubstr("no word for 100 ms from rank 3"));
}

TEST_P(LinkTest, OneThatDoesNotReceiveIsNotWaitedForForEver) {
  Ends ends = Make(milliseconds(100));
  std::vector<float> x(4 << 20);
  while (ends.first->Send(*first_stream_, View(x))) {
  }
  EXPECT_THAT(ends.first->error(), HasSubstr("no word for 100 ms from rank 5"));
}

TEST(SocketLink, AMessageOfAnotherSizeOrKindEndsTheLinkWithAReason) {
  const std::unique_ptr<Stream> stream = Stream::Cpu(1);
  for (const std::string& bytes : {std::string(64, 'x'), std::string("GET / HTTP/1.1\r\n\r\n")}) {
    int sockets[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
    auto link = MakeSocketLink(sockets[0], "rank 7", std::chrono::seconds(60));
    ASSERT_EQ(write(sockets[1], bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
    std::vector<float> in(4);
    EXPECT_FALSE(link->Receive(*stream, View(in)));
    EXPECT_THAT(link->error(), HasSubstr("rank 7 sent"));
    close(sockets[1]);
  }
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  auto first = MakeSocketLink(sockets[0], "rank 1"), second = MakeSocketLink(sockets[1], "rank 0");
  std::vector<float> out(5), in(4);
  ASSERT_TRUE(first->Send(*stream, View(out)));
  EXPECT_FALSE(second->Receive(*stream, View(in)));
  EXPECT_THAT(second->error(), HasSubstr("rank 0 sent a tensor of 20 bytes where one of 16 was expected"));
}

TEST(SocketLink, AnEndThatGoesAwayWithinATensorIsNamed) {
  const std::unique_ptr<Stream> stream = Stream::Cpu(1);
  int sockets[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
  auto link = MakeSocketLink(sockets[0], "rank 7", std::chrono::seconds(60));
  const uint64_t header[2] = {0x6b6e694c6f746c41, 16};  // as the other end would write it
  ASSERT_EQ(write(sockets[1], header, sizeof header), static_cast<ssize_t>(sizeof header));
  close(sockets[1]);
  std::vector<float> in(4);
  EXPECT_FALSE(link->Receive(*stream, View(in)));
  EXPECT_THAT(link->error(), HasSubstr("rank 7 has left"));
}

INSTANTIATE_TEST_SUITE_P(Transports, LinkTest, ::testing::ValuesIn(Transports()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace altiplano

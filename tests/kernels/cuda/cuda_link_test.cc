// Links between (simulated) GPUs. What is issued runs at once there, but the simulator knows which copies no event
// orders.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "kernels/comm/link.h"
#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

using std::chrono::milliseconds;

class CudaLinkTest : public CudaTest {
 protected:
  using Ends = std::pair<std::unique_ptr<Link>, std::unique_ptr<Link>>;
  static Ends Make(milliseconds patience = std::chrono::minutes(10), size_t most_bytes = 64) {
    std::string error;
    Ends ends = MakeCudaLink(
        {.from = 0, .to = 0, .most_bytes = most_bytes, .sender = "rank 3", .receiver = "rank 7", .patience = patience},
        &error);
    EXPECT_EQ(error, "");
    return ends;
  }
};

TEST_F(CudaLinkTest, TensorsComeInOrderWhicheverThreadIsFaster) {
  const Ends ends = Make();
  std::thread sender([&] {
    std::string error;
    const auto stream = Stream::Cuda(0, &error);
    for (int32_t i = 0; i < 50; ++i) {
      OnDevice x(*stream, std::vector<int32_t>{i, -i, i * i});
      const TensorView part = i % 2 == 0 ? x.view() : TensorView::Make(x.view().data, DType::kI32, {1}, Device::kCuda);
      EXPECT_TRUE(ends.first->Send(*stream, part));
      EXPECT_EQ(stream->Synchronize(), "");
    }
  });
  for (int32_t i = 0; i < 50; ++i) {
    const OnDevice x(stream(), std::vector<int32_t>(i % 2 == 0 ? 3 : 1));
    EXPECT_TRUE(ends.second->Receive(stream(), x.view()));
    EXPECT_EQ(x.Values(), i % 2 == 0 ? (std::vector<int32_t>{i, -i, i * i}) : std::vector<int32_t>{i});
  }
  sender.join();
  EXPECT_EQ(ends.first->error() + ends.second->error(), "");
}

// No host waits for a stream: a slot is copied from when it is full, and filled again when that has been done.
TEST_F(CudaLinkTest, EventsAloneOrderTheCopies) {
  const Ends ends = Make();
  std::string error;
  const auto receiver = Stream::Cuda(0, &error);
  const OnDevice x(stream(), std::vector<int32_t>{1, 2, 3}), y(*receiver, std::vector<int32_t>(3));
  for (int i = 0; i < 8; ++i) {
    EXPECT_TRUE(ends.first->Send(stream(), x.view()));
    EXPECT_TRUE(ends.second->Receive(*receiver, y.view()));
  }
  EXPECT_EQ(receiver->Synchronize(), "");
  EXPECT_EQ(y.Values(), (std::vector<int32_t>{1, 2, 3}));
}

TEST_F(CudaLinkTest, WhoDoesNotComeIsNamed) {
  const OnDevice x(stream(), std::vector<int32_t>{1});
  {
    const Ends ends = Make(milliseconds(50));
    EXPECT_FALSE(ends.second->Receive(stream(), x.view()));
    EXPECT_EQ(ends.first->error(), "no word for 50 ms from rank 3");
    EXPECT_FALSE(ends.first->Send(stream(), x.view()));
  }
  const Ends ends = Make(milliseconds(50));
  EXPECT_TRUE(ends.first->Send(stream(), x.view()));
  EXPECT_TRUE(ends.first->Send(stream(), x.view()));
  EXPECT_FALSE(ends.first->Send(stream(), x.view()));  // there is room for two
  EXPECT_EQ(ends.second->error(), "no word for 50 ms from rank 7");
}

TEST_F(CudaLinkTest, AnAbortAnEndThatGoesAndAWrongSizeEndIt) {
  const OnDevice one(stream(), std::vector<int32_t>{1}), two(stream(), std::vector<int32_t>{1, 2});
  Ends ends = Make();
  std::thread waits([&] {
    std::string error;
    const auto stream = Stream::Cuda(0, &error);
    EXPECT_FALSE(ends.second->Receive(*stream, one.view()));
  });
  ends.first->Abort("rank 3 has caught fire");
  ends.first->Abort("and drowned");
  waits.join();
  EXPECT_EQ(ends.second->error(), "rank 3 has caught fire");

  ends = Make();
  ends.second.reset();
  EXPECT_FALSE(ends.first->Send(stream(), one.view()));
  EXPECT_EQ(ends.first->error(), "a rank has left");

  ends = Make();
  EXPECT_TRUE(ends.first->Send(stream(), one.view()));
  EXPECT_FALSE(ends.second->Receive(stream(), two.view()));
  EXPECT_EQ(ends.first->error(), "rank 3 sent a tensor of 4 bytes where one of 8 was expected");
}

TEST_F(CudaLinkTest, RefusesWhatCannotBe) {
  std::string error;
  EXPECT_EQ(MakeCudaLink({.from = 0, .to = 99, .most_bytes = 8, .sender = "", .receiver = ""}, &error).first, nullptr);
  EXPECT_NE(error.find("GPU 99"), std::string::npos) << error;
  EXPECT_EQ(MakeCudaLink({.most_bytes = size_t{1} << 50, .sender = "rank 3", .receiver = ""}, &error).first, nullptr);
  EXPECT_NE(error.find("no memory on GPU 0"), std::string::npos) << error;
}

}  // namespace
}  // namespace altiplano

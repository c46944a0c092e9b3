#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/forwarding.h"
#include "tests/kernels/kernels_testlib.h"

namespace altiplano {
namespace {

using testing::HasSubstr;
using Members = std::vector<std::unique_ptr<Communicator>>;

constexpr auto kPatient = std::chrono::minutes(10);

// A member in whose memory sums come out wrong in the last bit, from its third call on.
class Wrong : public ForwardingCommunicator {
 public:
  explicit Wrong(std::unique_ptr<Communicator> member) : ForwardingCommunicator(std::move(member)) {}
  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    const bool together = member().AllReduceSum(stream, x);
    if (++calls_ >= 3) x.row<uint16_t>(x.dim(0) - 1)[0] ^= 1;
    return together;
  }

 private:
  int calls_ = 0;
};

Members MakeGroup(int ranks, const std::vector<int>& wrong) {
  Members group = MakeInProcessGroup(ranks, kPatient);
  for (int rank : wrong) {
    auto& member = group[static_cast<size_t>(rank)];
    member = std::make_unique<Wrong>(std::move(member));
  }
  for (auto& member : group) member = MakeChecked(std::move(member));
  return group;
}

void OnEachRank(const Members& group, const std::function<void(size_t, Communicator&, Stream&)>& fn) {
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < group.size(); ++rank) {
    threads.emplace_back([&, rank] {
      const auto stream = Stream::Cpu(1);
      fn(rank, *group[rank], *stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(CheckedGroup, DoesWhatTheGroupDoes) {
  OnEachRank(MakeGroup(3, {}), [](size_t rank, Communicator& member, Stream& stream) {
    EXPECT_EQ(member.rank(), static_cast<int>(rank));
    EXPECT_EQ(member.size(), 3);
    Matrix x(2, 5, DType::kF32, 3), residual(2, 5, DType::kF32), weight(1, 5, DType::kF32), out(2, 5, DType::kBF16);
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 5; ++j) x.set(i, j, static_cast<double>(rank));
    }
    residual.FillNormal(1);
    weight.FillNormal(2);
    EXPECT_TRUE(member.AllReduceSum(stream, x.view()));
    EXPECT_EQ(x.at(1, 4), 3);
    EXPECT_TRUE(member.AllReduceAddRmsNorm(
        stream, {.out = out.view(), .residual = residual.view(), .x = x.view(), .weight = weight.vector(), .eps = 1}));
    int32_t all[3] = {}, own = static_cast<int32_t>(rank) + 7;
    EXPECT_TRUE(member.AllGather(stream, TensorView::Make(all, DType::kI32, {1, 3}),
                                 TensorView::Make(&own, DType::kI32, {1, 1})));
    EXPECT_EQ(all[2], 9);
    EXPECT_TRUE(member.Broadcast(stream, TensorView::Make(&own, DType::kI32, {1})));
    EXPECT_EQ(own, 7);
    EXPECT_TRUE(member.CheckSame("something", 5));
    EXPECT_EQ(member.error(), "");
  });
}

// The sum of call n on every rank until somebody's is wrong.
std::string ReasonWith(int ranks, const std::vector<int>& wrong) {
  const Members group = MakeGroup(ranks, wrong);
  OnEachRank(group, [](size_t, Communicator& member, Stream& stream) {
    Matrix x(2, 3, DType::kBF16, 1);
    x.FillNormal(1);
    for (int call = 1; call <= 4; ++call) EXPECT_EQ(member.AllReduceSum(stream, x.view()), call < 3) << call;
  });
  return group[0]->error();
}

TEST(CheckedGroup, NamesTheRankWhoseSumsDiffer) {
  EXPECT_EQ(ReasonWith(3, {1}), "rank 1 differs from the others in the sum of call 3");
  EXPECT_EQ(ReasonWith(4, {0}), "rank 0 differs from the others in the sum of call 3");
  EXPECT_EQ(ReasonWith(5, {1, 4}), "ranks 1 and 4 differ from the others in the sum of call 3");
  // Of two ranks either may be wrong.
  EXPECT_THAT(ReasonWith(2, {1}), HasSubstr("ranks differ in the sum of call 3: "));
}

TEST(CheckedGroup, NamesTheRankThatBringsAnotherHash) {
  const Members group = MakeGroup(3, {});
  OnEachRank(group, [](size_t rank, Communicator& member, Stream&) {
    EXPECT_FALSE(member.CheckSame("the plan of step 7", rank == 2 ? 1 : 2));
  });
  EXPECT_EQ(group[0]->error(), "rank 2 differs from the others in the plan of step 7");
  // Other groups do not look.
  OnEachRank(MakeInProcessGroup(2),
             [](size_t rank, Communicator& member, Stream&) { EXPECT_TRUE(member.CheckSame("the plan", rank)); });
}

}  // namespace
}  // namespace altiplano

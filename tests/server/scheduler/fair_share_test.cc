#include "server/scheduler/fair_share.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <vector>

namespace altiplano {
namespace {

using testing::ElementsAre;

TEST(FairShare, ServiceOfThoseThatAreAlwaysBusyIsAsTheirWeights) {
  const std::vector<int32_t> weights = {1, 3, 1000, 7};
  FairShare share(weights);
  std::vector<int64_t> served(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) share.Join(i);
  std::minstd_rand random(1);
  for (int i = 0; i < 200000; ++i) {
    const size_t next = share.Order()[0];
    const auto service = 1 + static_cast<int64_t>(random() % 1000);
    share.Charge(next, service);
    served[next] += service;
    if (i % 1000 != 999) continue;
    for (size_t a = 0; a < weights.size(); ++a) {
      for (size_t b = 0; b < weights.size(); ++b) {
        // Whoever is lowest gets at most one more.
        EXPECT_LE(static_cast<double>(served[a]) / weights[a] - static_cast<double>(served[b]) / weights[b], 1001)
            << a << " " << b;
      }
    }
  }
}

TEST(FairShare, NobodyIsOwedWhatItDidNotUse) {
  const int32_t weights[] = {1, 1};
  FairShare share(weights);
  share.Join(0);
  share.Charge(0, 1'000'000);
  share.Join(1);
  EXPECT_EQ(share.Level(1), share.Level(0)) << "it was not there";
  share.Charge(1, 10);
  EXPECT_THAT(share.Order(), ElementsAre(0, 1));
}

TEST(FairShare, LeavingDoesNotSettleWhatOthersWaitedFor) {
  const int32_t weights[] = {1, 1, 1};
  FairShare share(weights);
  share.Join(0);
  share.Join(1);
  share.Charge(0, 5000);  // at once, while 1 waited
  share.Charge(1, 1000);
  share.Leave(0);
  share.Join(0);
  EXPECT_THAT(share.Order(), ElementsAre(2, 1, 0));
  share.Join(2);
  EXPECT_EQ(share.Level(2), share.Level(1)) << "level with the lowest";
  for (size_t i = 0; i < 3; ++i) share.Leave(i);
  share.Join(1);
  EXPECT_EQ(share.Level(1), share.Level(0)) << "nobody was there any more: all is settled";
}

}  // namespace
}  // namespace altiplano

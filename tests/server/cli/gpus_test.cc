#include "server/cli/gpus.h"

#include <gtest/gtest.h>

namespace altiplano::cli {
namespace {

using Assigned = std::vector<std::vector<int>>;

TEST(AssignGpus, EachReplicaHasItsOwn) {
  EXPECT_EQ(AssignGpus("", 1, 1, 1).value(), (Assigned{{0}}));
  EXPECT_EQ(AssignGpus("", 2, 4, 8).value(), (Assigned{{0, 1, 2, 3}, {4, 5, 6, 7}}));
  EXPECT_EQ(AssignGpus("6,4,1,0", 2, 2, 8).value(), (Assigned{{6, 4}, {1, 0}}));
  EXPECT_EQ(AssignGpus("0,0", 2, 1, 1).value(), (Assigned{{0}, {0}}));  // shared, since it is said twice
}

TEST(AssignGpus, RefusesTooFewWithTheNumbers) {
  auto few = AssignGpus("", 3, 2, 4);
  EXPECT_EQ(few.status().code(), Code::kUnavailable);
  EXPECT_EQ(few.status().message(),
            "--device cuda needs 6 GPUs, one for each of the 2 ranks of 3 replicas; this process sees 4; lower "
            "--tensor-parallel, --pipeline-parallel or --replicas");
  EXPECT_EQ(
      AssignGpus("0,1,2,4", 2, 2, 4).status().message(),
      "--devices names GPU 4, but this process sees 4 GPUs, counted from 0; CUDA_VISIBLE_DEVICES may hide others");
  EXPECT_EQ(AssignGpus("0,1", 1, 1, 8).status().message(), "--devices names 2 GPUs, but 1 is needed");
  auto list = AssignGpus("0,1,2", 1, 4, 8);
  EXPECT_EQ(list.status().code(), Code::kOutOfRange);
  EXPECT_EQ(list.status().message(),
            "--devices names 3 GPUs, but 4 are needed, one for each of the 4 ranks of 1 replica");
}

TEST(AssignGpus, RefusesWhatIsNoList) {
  for (const char* list : {",", "0,", "0,,1", "a", "0;1", "-1", "0, 1", "99999999999"}) {
    EXPECT_EQ(AssignGpus(list, 1, 2, 8).status().code(), Code::kOutOfRange) << list;
  }
  EXPECT_EQ(AssignGpus("0,1,", 1, 2, 8).status().message(),
            "--devices: \"0,1,\" has an empty element: write commas between values only; give the GPUs' numbers, such "
            "as 0,1");
  EXPECT_EQ(AssignGpus("0,x", 1, 2, 8).status().message(),
            "--devices: \"x\" must be a whole number from 0 to 255; give the GPUs' numbers, such as 0,1");
}

}  // namespace
}  // namespace altiplano::cli

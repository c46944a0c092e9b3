#include "server/cluster/launcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace altiplano::cluster {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

StatusOr<Place> From(const char* launcher, const std::map<std::string, std::string>& environment) {
  return PlaceFromEnvironment(launcher, [&](const char* name) -> const char* {
    auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

TEST(Launcher, EachSaysWhoLeads) {
  auto place = From(
      "lws", {{"LWS_WORKER_INDEX", "1"}, {"LWS_GROUP_SIZE", "4"}, {"LWS_LEADER_ADDRESS", "llama-0.llama.default"}});
  ASSERT_TRUE(place.ok()) << place.status().ToString();
  EXPECT_EQ(place->rank, 1);
  EXPECT_EQ(place->nodes, 4);
  EXPECT_EQ(place->leader, "llama-0.llama.default:50060");

  place = From("slurm", {{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "2"}, {"SLURM_NODELIST", "gpu[07-08]"}});
  ASSERT_TRUE(place.ok()) << place.status().ToString();
  EXPECT_EQ(place->rank, 0);
  EXPECT_EQ(place->nodes, 2);
  EXPECT_EQ(place->leader, "gpu07:50060");

  place = From("openmpi", {{"OMPI_COMM_WORLD_RANK", "2"}, {"OMPI_COMM_WORLD_SIZE", "3"}});
  ASSERT_TRUE(place.ok()) << place.status().ToString();
  EXPECT_EQ(place->rank, 2);
  EXPECT_EQ(place->nodes, 3);
  EXPECT_EQ(place->leader, "") << "mpirun does not say: --leader must";
}

TEST(Launcher, WhatIsMissingOrMakesNoSenseIsNamed) {
  EXPECT_THAT(From("lws", {}).status().message(), HasSubstr("LWS_WORKER_INDEX is not set"));
  EXPECT_THAT(From("lws", {{"LWS_WORKER_INDEX", "1"}, {"LWS_GROUP_SIZE", "4"}}).status().message(),
              HasSubstr("LWS_LEADER_ADDRESS is not set"));
  for (const char* bad : {"x", "-1", "1 ", "99999999999"}) {
    EXPECT_THAT(From("openmpi", {{"OMPI_COMM_WORLD_RANK", bad}}).status().message(), HasSubstr("OMPI_COMM_WORLD_RANK="))
        << bad;
  }
  EXPECT_THAT(From("openmpi", {{"OMPI_COMM_WORLD_RANK", "3"}, {"OMPI_COMM_WORLD_SIZE", "3"}}).status().message(),
              HasSubstr("node 3 of 3"));
  EXPECT_THAT(
      From("slurm", {{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "2"}, {"SLURM_NODELIST", "gpu[07"}}).status().message(),
      HasSubstr("SLURM_NODELIST=gpu[07"));
}

TEST(Launcher, SlurmsShortFormOfHosts) {
  EXPECT_THAT(ExpandHosts("a").value(), ElementsAre("a"));
  EXPECT_THAT(ExpandHosts("a,b-1,c").value(), ElementsAre("a", "b-1", "c"));
  EXPECT_THAT(ExpandHosts("a[1-3,07],b").value(), ElementsAre("a1", "a2", "a3", "a07", "b"));
  EXPECT_THAT(ExpandHosts("n[098-101]").value(), ElementsAre("n098", "n099", "n100", "n101"));
  EXPECT_THAT(ExpandHosts("x[1],y[2]").value(), ElementsAre("x1", "y2"));
  for (const char* bad : {"", ",", "a,,b", "a[", "a[]", "a[1", "a[x]", "a[3-1]", "a[1-]", "a[1,]", "[1]", "a[1]b",
                          "a[1],", "a[0-65536]"}) {
    EXPECT_FALSE(ExpandHosts(bad).has_value()) << bad;
  }
}

}  // namespace
}  // namespace altiplano::cluster

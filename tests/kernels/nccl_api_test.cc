// Our declarations of NCCL against its own header, where that is installed, and against the library.
#include "kernels/comm/nccl_api.h"

#include <gtest/gtest.h>

#if __has_include(<nccl.h>) && __has_include(<cuda_runtime.h>)
#include <nccl.h>
#define ALTIPLANO_HAVE_NCCL_H
#endif

namespace altiplano {
namespace {

#ifdef ALTIPLANO_HAVE_NCCL_H
static_assert(kNcclSuccess == static_cast<int>(ncclSuccess) && kNcclInProgress == static_cast<int>(ncclInProgress));
static_assert(kNcclFloat32 == static_cast<int>(ncclFloat32) && kNcclBFloat16 == static_cast<int>(ncclBfloat16));
static_assert(kNcclSum == static_cast<int>(ncclSum));
static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId));
static_assert(offsetof(NcclConfig, magic) == offsetof(ncclConfig_t, magic) &&
              offsetof(NcclConfig, blocking) == offsetof(ncclConfig_t, blocking) &&
              offsetof(NcclConfig, net_name) == offsetof(ncclConfig_t, netName) &&
              offsetof(NcclConfig, split_share) == offsetof(ncclConfig_t, splitShare) &&
              sizeof(NcclConfig) <= sizeof(ncclConfig_t));
static_assert(NcclConfig::kUndefined == NCCL_CONFIG_UNDEF_INT);

TEST(NcclApi, ConfigBeginsAsTheHeaderSays) {
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  EXPECT_EQ(NcclConfig().magic, theirs.magic);
}
#endif

TEST(NcclApi, IsFoundOrTheReasonIsSaid) {
  std::string error;
  const NcclApi* api = LoadNccl(&error);
  if (api == nullptr) {
    EXPECT_NE(error, "");
    std::string again;
    EXPECT_EQ(LoadNccl(&again), nullptr);
    EXPECT_EQ(again, error);
    GTEST_SKIP() << error;
  }
  int version = 0;
  EXPECT_EQ(api->get_version(&version), kNcclSuccess);
  EXPECT_GE(version, 21800);
  EXPECT_EQ(api->comm_register != nullptr, version >= 21900);
  EXPECT_NE(std::string(api->error_string(kNcclInProgress)), "");
}

}  // namespace
}  // namespace altiplano

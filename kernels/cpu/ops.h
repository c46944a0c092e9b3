// The CPU twins of kernels/ops.h, one file each. The door has checked every shape and dtype that ops.h names.
// Each returns when the whole team is done.
#pragma once

#include "kernels/cpu/thread_team.h"
#include "kernels/ops.h"

namespace altiplano::cpu {

void Embed(ThreadTeam& team, const EmbedArgs& args);
void RmsNorm(ThreadTeam& team, const RmsNormArgs& args);
void AddRmsNorm(ThreadTeam& team, const AddRmsNormArgs& args);
void Linear(ThreadTeam& team, const LinearArgs& args);
void SiluMul(ThreadTeam& team, const SiluMulArgs& args);
void RopeStoreKv(ThreadTeam& team, const RopeStoreKvArgs& args);
void PagedAttention(ThreadTeam& team, const PagedAttentionArgs& args);
void GatherRows(ThreadTeam& team, const GatherRowsArgs& args);
size_t SampleScratchBytes(int64_t rows, int64_t vocab);
void Sample(ThreadTeam& team, const SampleArgs& args);
void Score(ThreadTeam& team, const ScoreArgs& args);

}  // namespace altiplano::cpu

// RankWorker: executes plans on one rank: inputs, forward, logits, sampling. One thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "server/engine/slot_states.h"
#include "server/engine/step_inputs.h"
#include "server/model/kv_cache.h"
#include "server/model/llama.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class RankWorker {
 public:
  struct Limits {
    int32_t max_running = 0;  // slots
    int32_t max_context = 0;  // tokens of one sequence
  };

  RankWorker(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, KvCache cache, Limits limits,
             std::vector<TokenId> eos_ids);

  StepResult Execute(const StepPlan& plan);

  // Computes one token and checks that its logits are finite: weights that overflow are found before READY.
  // Writes page 0; call before serving.
  Status WarmUp();

  Stream& stream() { return *stream_; }
  const Llama& llama() const { return *llama_; }
  const KvCache& cache() const { return cache_; }

 private:
  void ScorePrompts(const StepPlan& plan, StepResult* result);
  void SampleTokens(const StepPlan& plan, StepResult* result);

  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<Llama> llama_;
  KvCache cache_;
  SlotStates slots_;
  StepInputBuilder inputs_;
  Buffer sample_scratch_;
  // Reused between steps; sized for the largest Logits call.
  std::vector<int32_t> rows_;
  std::vector<SampleParams> params_;
  std::vector<SampleResult> results_;
  std::vector<int32_t> num_top_;
};

}  // namespace altiplano

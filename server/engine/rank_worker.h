// RankWorker: executes plans on one rank: inputs, forward, logits, sampling. One thread.
//
// With several ranks each has its part of the vocabulary: rank 0 gathers the logits, samples once, and sends the ids
// round, so that all ranks go on with the same tokens by construction. With several stages each hands its residual
// stream to the next; the last one samples and hands the ids to the first, where they are inputs of the next step.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/link.h"
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

  // Whom the rank talks to.
  struct Peers {
    Communicator* communicator = nullptr;  // that the model was made with; null for one rank
    Link* previous = nullptr;              // to the same rank of the stage before; the first stage's is the last
    Link* next = nullptr;                  // both null for one stage
  };
  // Null when the memory cannot be had.
  static std::unique_ptr<RankWorker> Create(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, KvCache cache,
                                            Limits limits, std::vector<TokenId> eos_ids, Peers peers);

  // Scores and tokens come from the one that samples: rank 0 of the last stage. UNAVAILABLE when the group was aborted.
  StepResult Execute(const StepPlan& plan);

  // Computes one token and checks that its logits are finite: weights that overflow are found before READY.
  // Writes page 0; call before serving, on all ranks at once.
  Status WarmUp();

  bool samples() const { return is_first() && llama_->shard().last_stage(); }  // the plan's results are this rank's
  Stream& stream() { return *stream_; }
  const Llama& llama() const { return *llama_; }
  const KvCache& cache() const { return cache_; }

 private:
  RankWorker(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, KvCache cache, Limits limits,
             std::vector<TokenId> eos_ids, Peers peers);
  bool is_first() const { return communicator_ == nullptr || communicator_->rank() == 0; }
  Status Aborted() const;
  // Forward, with what comes from the stage before and goes to the next. False: the group was aborted.
  bool ForwardStage(const StepInputs& inputs);
  // First of several stages: waits for the ids that the plan's inputs need. False: the group was aborted.
  bool ReceiveSampled(const StepPlan& plan);
  // Logits of rows_ [R, V]; on other ranks than the first nothing to look at. nullopt: the group was aborted.
  std::optional<TensorView> Logits();
  bool ScorePrompts(const StepPlan& plan, StepResult* result);
  bool SampleTokens(const StepPlan& plan, StepResult* result);
  bool ShareSampled();

  Communicator* const communicator_;
  Link* const previous_;
  Link* const next_;
  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<Llama> llama_;
  KvCache cache_;
  SlotStates slots_;
  StepInputBuilder inputs_;
  Buffer sample_scratch_;
  Buffer gathered_;  // [R, V' * ranks] f32, rank 0 of several only
  // Reused between steps; sized for the largest Logits call.
  std::vector<int32_t> rows_;
  std::vector<int32_t> sampled_;
  std::vector<SampleParams> params_;
  std::vector<SampleResult> results_;
  std::vector<int32_t> num_top_;
  // Several stages. On the last: what the step sampled. On the first: the slots that sample in steps whose ids have not
  // come yet, oldest first.
  std::vector<int32_t> step_ids_;
  std::deque<std::vector<int32_t>> waiting_slots_;
};

}  // namespace altiplano

// RankWorker: executes plans on one rank: inputs, forward, logits, sampling.
//
// Enqueue issues a step, Collect waits for it. On a GPU the step after can be enqueued before the one before has been
// collected, so that the GPU never waits for the host: what a step sampled is read by the next one in device memory.
// Two steps at most are on their way. On the CPU a step has run when Enqueue returns.
//
// With several ranks each has its part of the vocabulary: rank 0 gathers the logits, samples once, and sends the ids
// round, so that all ranks go on with the same tokens by construction. With several stages each hands its residual
// stream to the next; the last one samples and hands the ids to the first, where they are inputs of the next step.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/link.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "server/engine/decode_graphs.h"
#include "server/engine/slot_states.h"
#include "server/engine/step_inputs.h"
#include "server/engine/step_timer.h"
#include "server/model/kv_cache.h"
#include "server/model/llama.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

class RankWorker {
 public:
  using Limits = StepInputBuilder::Limits;

  // Whom the rank talks to.
  struct Peers {
    Communicator* communicator = nullptr;  // that the model was made with; null for one rank
    Link* previous = nullptr;              // to the same rank of the stage before; the first stage's is the last
    Link* next = nullptr;                  // both null for one stage
  };
  // Null when the memory cannot be had.
  static std::unique_ptr<RankWorker> Create(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, Limits limits,
                                            std::vector<TokenId> eos_ids, Peers peers);

  // Before the first step: from then on Collect tells of its times. False when the device has no more events.
  bool TimeSteps();
  // A step of `tokens` tokens in a small cache of its own, whose logits must be finite: weights that overflow are found
  // before READY, and afterwards the device holds all that a step of that size makes it take. In three parts, of which
  // all ranks end one before any begins the next: memory is taken, RESOURCE_EXHAUSTED if there is none; the step, on
  // all ranks at once; the memory is given back.
  Status BeginWarmUp(int32_t tokens, KvCache::Shape shape);
  Status WarmUp();
  void EndWarmUp();
  // Before the first Enqueue.
  void SetCache(KvCache cache);
  // On a GPU, after SetCache: steps that only decode are replayed from graphs of their padded shape from now on. On all
  // ranks at once: each shape runs before it is captured. Sampling is not captured, its parameters are arguments.
  // Graphs of the smallest shapes first, and as many as there is memory for: larger steps are issued op by op. Ranks of
  // a group must have the same, since what they sum is padded alike.
  Status CaptureDecodeGraphs();
  void KeepDecodeGraphs(size_t n);  // of those the first n
  size_t decode_graphs() const { return graphs_.size(); }
  size_t decode_graph_shapes() const { return graph_shapes_.size(); }
  // Grows with each op on the CPU, and with each step and graph of CaptureDecodeGraphs. Any thread.
  uint64_t progress() const;

  // Of one thread, which has called stream().UseFromThisThread(). UNAVAILABLE when the group was aborted, INTERNAL when
  // the device failed.
  Status Enqueue(const StepPlan& plan);

  // Of another thread, of the oldest step that was enqueued. Scores and tokens come from the one that samples.
  bool Done() const { return pending_[collected_ % 2].done->Passed(); }
  // times: null, or where the step's are put if steps are timed.
  StepResult Collect(StepTimes* times = nullptr);

  bool samples() const { return is_first() && llama_->shard().last_stage(); }  // the plan's results are this rank's
  Stream& stream() { return *stream_; }
  const Llama& llama() const { return *llama_; }
  const KvCache& cache() const { return *cache_; }

 private:
  // A step on its way. Enqueue fills it before, Collect reads it after whoever calls them has synchronized.
  struct Pending {
    uint64_t step = 0;
    std::vector<int32_t> num_scores;  // of each sequence with prompt log-probabilities
    int32_t num_sampled = 0;
    Buffer results;  // SampleResult: the prompts' scores, then the samples; of the one that samples
    std::unique_ptr<StreamEvent> done;
    std::chrono::steady_clock::time_point begin, end;  // end: unset when the step was still running
  };

  RankWorker(std::unique_ptr<Stream> stream, std::unique_ptr<Llama> llama, Peers peers);
  bool AllocateBuffers(const Limits& limits, std::vector<TokenId> eos_ids);
  bool is_first() const { return communicator_ == nullptr || communicator_->rank() == 0; }
  Status Aborted() const;
  // First of several stages: waits for the ids that the plan's inputs need. False: the group was aborted.
  bool ReceiveSampled(const StepPlan& plan);
  StepInputBuilder::Step BuildInputs(const StepPlan& plan, const DecodeShape* padded);
  // Forward of a step of `tokens`, or the graph that has it and the logits of the step; with what comes from the stage
  // before and goes to the next. False: the group was aborted.
  bool ForwardStage(const StepInputs& inputs, int64_t tokens, const StepGraph* graph);
  // The ranks' parts of logits [R, V'] together: [R, V]; on other ranks than the first nothing to look at. nullopt: the
  // group was aborted.
  std::optional<TensorView> WholeLogits(const TensorView& part);
  bool ScorePrompts(const StepPlan& plan, const TensorView& rows, SampleResult* results);
  // have_logits: of all rows, from the step's graph.
  bool SampleTokens(const StepPlan& plan, const TensorView& rows, bool have_logits, SampleResult* results);

  Communicator* const communicator_;
  Link* const previous_;
  Link* const next_;
  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<Llama> llama_;
  // Enqueue's thread.
  std::optional<KvCache> cache_;
  StepPlan warm_up_;
  std::optional<StepInputBuilder> inputs_;
  std::unique_ptr<SlotStates> slots_;  // of the one that samples
  Buffer sampled_;                     // [B] i32: what the last step sampled, where the next one finds it
  Buffer sample_scratch_;              // likewise
  Buffer gathered_;                    // [R, V' * ranks] f32, of the one that samples of several
  std::vector<DecodeShape> graph_shapes_;
  std::vector<std::unique_ptr<StepGraph>> graphs_;  // of each shape, or of the first ones
  std::atomic<uint64_t> prepared_{0};               // steps and graphs, by CaptureDecodeGraphs
  std::vector<SampleParams> params_;                // reused between steps
  std::vector<int32_t> num_top_;                    // likewise
  std::unique_ptr<StepTimer> timer_;                // null: steps are not timed
  // First of several stages: how many ids each step sampled whose ids have not come yet, oldest first.
  std::deque<int64_t> waiting_ids_;
  uint64_t enqueued_ = 0;
  // Both threads', as Pending says.
  std::array<Pending, 2> pending_;
  // Collect's thread.
  uint64_t collected_ = 0;
  std::chrono::steady_clock::time_point last_end_;
};

}  // namespace altiplano

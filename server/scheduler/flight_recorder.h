// FlightRecorder: the last calls of a scheduler with what it decided, in a ring of fixed size. Costs a few microseconds
// a step and no allocation once its scratch has grown to the largest step. docs/flight_records.md.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "server/base/clock.h"
#include "server/base/crash.h"
#include "server/base/sha256.h"
#include "server/scheduler/flight_frame_writer.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/prefix_cache.h"
#include "server/scheduler/request.h"
#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

// The fields of FlightArrival, and a list of FlightPlanned.
void PutArrival(RequestKey key, const Request& request, FlightFrameWriter* out);
void PutPlanned(const StepPlan& plan, FlightFrameWriter* out);

class FlightRecorder : private crash::LastAct {
 public:
  static constexpr size_t kNoCheckpoints = SIZE_MAX;
  // A ring of fewer has no room for checkpoints once the prefix cache fills a pool of that many blocks: such a record
  // can be read, but not replayed. What live requests take comes to it.
  static size_t LeastBytes(int32_t num_blocks);

  // Of one scheduler, made with these options; `bytes` of frames are kept. A checkpoint comes after every `between`
  // bytes of other frames: by default so often that a full ring always has one with what was said for it, if both
  // together take no more than a quarter of the ring. A checkpoint that alone takes more is not kept.
  FlightRecorder(const SchedulerOptions& options, size_t bytes) : FlightRecorder(options, bytes, bytes / 5) {}
  FlightRecorder(const SchedulerOptions& options, size_t bytes, size_t between);

  // When the process dies of a bug, the file is written to `path`, where nothing may be by then, and a line on stderr
  // says so. Once, before anything is recorded.
  void WriteAtCrash(std::string path);

  // The scheduler's thread.
  void OnArrival(RequestKey key, const Request& request);
  void OnCancel(RequestKey key, Code code);
  void OnStop(RequestKey key, uint32_t sequence);
  void OnCacheReset();
  void OnAbort(TimePoint now);
  void OnBlockName(RequestKey key, uint32_t sequence, int32_t block, const BlockHash& name);
  void OnPreempt(RequestKey key, uint32_t sequence);
  // `events`: those of this call.
  void OnPlan(TimePoint now, const StepPlan* plan, const PlanNotes& notes, std::span<const Event> events);
  void OnResult(TimePoint now, const StepPlan& plan, const StepResult& result, std::span<const Event> events);

  // The names of consecutive blocks, valid until they get others: name(block), of at most kMostNames.
  static constexpr int32_t kMostNames = 1024;
  template <typename Name>
  void OnPublish(BlockId first, int32_t count, const Name& name) {
    if (!makes_checkpoints()) return;
    uint8_t* at = BeginBlockNames(first, count);
    for (BlockId block = first; block < first + count; ++block, at += sizeof(uint64_t)) {
      std::memcpy(at, name(block).data(), sizeof(uint64_t));
    }
    block_names_.End(at);
  }
  bool makes_checkpoints() const { return between_ != kNoCheckpoints; }
  // A request as of now (kSaidRequest), for the scheduler to write.
  FlightFrameWriter* BeginRequest();
  void EndRequest() { KeepSaid(&request_); }
  // Before a plan: which of the pool's blocks are to be named again (OnPublish), and which live requests to be said, so
  // that all are in the ring when the next checkpoint comes, and a few in each step.
  struct Part {
    size_t begin = 0, end = 0;
  };
  Part NextToName(size_t num_blocks) { return Next(num_blocks, &next_to_name_); }
  Part NextToSay(size_t num_live) { return Next(num_live, &next_to_say_); }
  // Then: whether the scheduler is to write its state into BeginCheckpoint(), as far as there is room, and then to say
  // whether it is whole.
  bool checkpoint_due() const { return others() >= between_; }
  FlightFrameWriter* BeginCheckpoint();
  void EndCheckpoint(bool whole);

  // Any thread: the file, as of now. The scheduler's thread waits while the ring is copied.
  std::string Write(TimePoint now, int64_t unix_ns) const;

 private:
  void Keep(FlightFrameWriter* frame);  // moves it into the ring
  void KeepSaid(FlightFrameWriter* frame);
  uint64_t others() const { return end_ - checkpointed_ - said_; }  // bytes of other frames since the last checkpoint
  Part Next(size_t total, size_t* next) const;
  void FlushNames();
  uint8_t* BeginBlockNames(BlockId first, int32_t count);
  void FlushBlockNames();
  void AddEnds(std::span<const Event> events);
  void DropOldest();
  void Put(std::span<const uint8_t> bytes, uint64_t at);
  // The file into sink(data, size), piece by piece; async-signal-safe if that is. Nothing is recorded meanwhile.
  template <typename Sink>
  void Emit(TimePoint now, int64_t unix_ns, const Sink& sink) const;
  void OnCrash(int signal) noexcept override;

  const std::string header_;  // the options
  const size_t between_;

  // The scheduler's thread.
  FlightFrameWriter frame_;
  FlightFrameWriter checkpoint_;
  uint64_t checkpointed_ = 0;  // end_ after the last one
  uint64_t said_ = 0;          // bytes since then that the next one relies on
  FlightFrameWriter block_names_;
  BlockId block_named_ = 0;  // behind the last one in block_names_
  size_t next_to_name_ = 0, next_to_say_ = 0;
  FlightFrameWriter request_;
  FlightFrameWriter names_;  // of consecutive blocks of one sequence
  RequestKey names_key_ = 0;
  uint32_t names_sequence_ = 0;
  int32_t names_next_ = 0;
  std::vector<FlightPreempted> preempted_;  // since the last plan

  mutable std::mutex mutex_;
  // Written with mutex_ held. Frames one after the other, each behind its length and kind; where they begin and end
  // counts all bytes that ever were in the ring. A crash takes no lock: at every moment whole frames lie between the
  // two.
  std::vector<uint8_t> ring_;
  std::atomic<uint64_t> begin_{0}, end_{0}, dropped_frames_{0}, dropped_steps_{0};

  std::string crash_path_;
  std::atomic<bool> keeping_{false};          // a frame is being moved into the ring
  std::atomic<bool> crashed_{false};          // the ring stays as it is
  std::optional<crash::Registration> crash_;  // last: nothing is gone before it
};

}  // namespace altiplano

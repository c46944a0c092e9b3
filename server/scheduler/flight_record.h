// FlightRecord: what a FlightRecorder wrote, read back. Everything that went into a scheduler and all that it decided,
// in the order of the calls; of prompts and answers only lengths and the names of blocks, which say who shares what.
//
// The file: "ALTIFLR\n", version (4 bytes, little endian), header, frames, SHA-256 of all before it. Numbers are
// LEB128, signed ones in zigzag; times are nanoseconds of the server's steady clock. A frame is its length, its kind
// (one byte) and its fields in the order of the structs below.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/base/types.h"
#include "server/scheduler/block_pool.h"
#include "server/scheduler/fair_share.h"
#include "server/scheduler/request.h"
#include "server/scheduler/scheduler.h"
#include "server/scheduler/step_cost_learner.h"

namespace altiplano {

inline constexpr std::string_view kFlightMagic = "ALTIFLR\n";
inline constexpr uint32_t kFlightVersion = 5;

enum class FlightKind : uint8_t {
  kArrival = 1,
  kCancel,
  kStop,
  kCacheReset,
  kAbort,
  kNames,
  kPlan,
  kResult,
  kCheckpoint,
  kBlockNames,
  kSaidRequest
};

struct FlightArrival {
  RequestKey key = 0;
  std::string id;
  std::string tenant;
  int32_t prompt_tokens = 0;
  int32_t num_sequences = 1;
  int32_t max_new_tokens = 0;
  int32_t priority = 0;
  bool bypasses_cache = false;
  bool scores_prompt = false;
  TimePoint arrival{}, queue_deadline = kNever, deadline = kNever, time_limit = kNever;
  Duration ttft_target{};

  bool operator==(const FlightArrival&) const = default;
};
struct FlightCancel {
  RequestKey key = 0;
  Code code = Code::kOk;

  bool operator==(const FlightCancel&) const = default;
};
struct FlightStop {
  RequestKey key = 0;
  uint32_t sequence = 0;

  bool operator==(const FlightStop&) const = default;
};
struct FlightCacheReset {
  bool operator==(const FlightCacheReset&) const = default;
};
struct FlightAbort {
  TimePoint now{};

  bool operator==(const FlightAbort&) const = default;
};
// Of consecutive full blocks of one sequence; equal names are equal contents from position 0 on.
struct FlightNames {
  RequestKey key = 0;
  uint32_t sequence = 0;  // BlockNamer::kPrompt: all of them, blocks within the prompt
  int32_t first_block = 0;
  std::vector<uint64_t> names;  // the first 8 bytes of each

  bool operator==(const FlightNames&) const = default;
};
// How a sequence ended, or a request: then `sequence` is kRequest, and `code` its status.
struct FlightEnd {
  static constexpr uint32_t kRequest = UINT32_MAX;
  RequestKey key = 0;
  uint32_t sequence = 0;
  FinishReason finish = FinishReason::kNone;
  bool with_token = false;  // the last token came in this call
  Code code = Code::kOk;

  bool operator==(const FlightEnd&) const = default;
};
struct FlightPlanned {
  RequestKey key = 0;
  uint32_t sequence = 0;
  int32_t slot = 0;
  int32_t first_position = 0;
  int32_t num_tokens = 0;
  bool admitted = false;  // in this plan, into this slot
  bool sample = false;
  bool scores = false;

  bool operator==(const FlightPlanned&) const = default;
};
struct FlightPreempted {
  RequestKey key = 0;
  uint32_t sequence = 0;

  bool operator==(const FlightPreempted&) const = default;
};
struct FlightPlan {
  TimePoint now{};
  uint64_t step = 0;  // 0: there was nothing to compute
  PlanNotes notes;
  int32_t prefill_tokens = 0;
  std::vector<FlightPreempted> preempted;
  std::vector<FlightEnd> ends;  // before anything was planned
  std::vector<FlightPlanned> sequences;

  bool operator==(const FlightPlan&) const = default;
};
struct FlightResult {
  TimePoint now{};
  uint64_t step = 0;
  Duration device_time{};
  std::vector<uint32_t> non_finite;  // indices into the plan's sequences: what they sampled or scored was NaN
  std::vector<FlightEnd> ends;

  bool operator==(const FlightResult&) const = default;
};

// The whole state of a scheduler that is about to plan, so far as it decides anything: a record can be replayed from
// here. Blocks are by their ids at that time, names are their first 8 bytes. In the file the names of published blocks
// are in frames before it (kBlockNames): of each block when it is published, and again between any two checkpoints. So
// is what does not change any more of a request that decodes (kSaidRequest): all of it but how far it has come.
struct FlightCheckpoint {
  enum class State : uint8_t { kHeld, kWaiting, kRunning, kEnded };  // live_request.h
  struct Sequence {
    State state = State::kHeld;
    bool admitted = false;
    int32_t generated = 0;
    int32_t charged = 0;
    int32_t preempted = 0;
    // Of kRunning only:
    int32_t slot = -1;
    int32_t scheduled = 0;
    int32_t computed = 0;
    int32_t published = 0;
    std::vector<BlockId> blocks;
    std::vector<uint64_t> names;  // of blocks behind the prompt's, as far as they have been needed

    bool operator==(const Sequence&) const = default;
  };
  struct Request {
    FlightArrival arrival;
    uint64_t order = 0;
    bool admitted = false;
    bool hurries = false;
    TimePoint start_by{};
    Duration hopeless_before{};  // the deadline, by so much
    int32_t scored = 0;
    int32_t leader = -1;  // among the sequences; -1: none
    std::vector<BlockId> shared;
    std::vector<uint64_t> names;  // of blocks within the prompt, as far as they have been needed
    std::vector<Sequence> sequences;

    bool operator==(const Request&) const = default;
  };
  struct Held {
    BlockId block = 0;
    bool valued = false;
    std::optional<uint64_t> name;  // of a published block

    bool operator==(const Held&) const = default;
  };
  struct Blocked {
    RequestKey key = 0;
    uint32_t sequence = 0;
    int32_t until_available = 0;
    uint64_t until_step = 0;

    bool operator==(const Blocked&) const = default;
  };

  bool whole = true;                       // nothing that was said before it has left the ring
  TimePoint now{};                         // of the plan that follows
  uint64_t step = 0;                       // of the last plan; that of the step in flight, if there is one
  uint64_t orders = 0;                     // of arrival that have been given
  std::optional<StepCostLearner> learner;  // only where the cost is learned
  int64_t floor = 0;
  std::vector<FairShare::Service> accounts;
  std::vector<int32_t> free_slots;              // the last one is taken first
  std::vector<Held> held;                       // by block
  std::vector<uint64_t> cached, cached_valued;  // unreferenced, oldest first
  std::vector<Request> requests;                // live
  std::vector<RequestKey> sharing;              // those with `shared`, oldest first
  std::optional<Blocked> blocked;
  // The step in flight: empty when there is none. Slots are not in it.
  std::vector<FlightPlanned> in_flight;
  std::vector<BlockId> retired;
  // That came since the last call.
  std::vector<FlightCancel> cancels;
  std::vector<FlightStop> stops;

  bool operator==(const FlightCheckpoint&) const = default;
};

using FlightFrame = std::variant<FlightArrival, FlightCancel, FlightStop, FlightCacheReset, FlightAbort, FlightNames,
                                 FlightPlan, FlightResult, FlightCheckpoint>;

struct FlightRecord {
  SchedulerOptions options;   // without eos_ids
  int64_t written_at_ns = 0;  // of the Unix epoch, at steady time `written`
  TimePoint written{};
  uint64_t dropped_frames = 0;  // older than the oldest one here
  uint64_t dropped_steps = 0;
  size_t frame_bytes = 0;  // of all frames in the file
  std::vector<FlightFrame> frames;
};

// INVALID_ARGUMENT, one line, for anything but a whole file of this version.
StatusOr<FlightRecord> ParseFlightRecord(std::string_view file);

}  // namespace altiplano

// A group of nodes that serve one model together: each has a run of the pipeline's stages. Node 0 leads: it has the
// front end, the scheduler and the first stages, and sends every plan to the others. docs/parallelism.md.
//
// A node that fails, is silent for too long or loses its connection ends the group on all nodes.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "server/base/status.h"
#include "server/cluster/launcher.h"
#include "server/engine/executor.h"
#include "server/engine/local_executor.h"
#include "server/model/checkpoint.h"

namespace altiplano::cluster {

struct GroupOptions {
  Place place;
  std::map<std::string, std::string> terms;  // must be equal on all nodes; by name, for messages
  std::string secret;                        // of the group; empty: none, whoever comes may join
  std::chrono::milliseconds join_patience = std::chrono::minutes(10);   // until all have joined
  std::chrono::milliseconds silence = std::chrono::seconds(30);         // a node not heard of for this long is lost
  std::chrono::milliseconds health_deadline = std::chrono::seconds(4);  // and already for this long: not healthy
  std::function<bool()> cancelled;                                      // polled; true: give up with CANCELLED
};

// The leader's side.
class Leader {
 public:
  // Listens for followers. UNAVAILABLE when the address cannot be had.
  static StatusOr<std::unique_ptr<Leader>> Start(GroupOptions options);
  // After the executor: followers are told that it is over.
  ~Leader();

  struct Formed {
    std::unique_ptr<Executor> executor;
    SchedulerOptions scheduler;  // as LocalExecutor::scheduler_options; of the node with the least KV blocks
    std::string device;
    uint64_t weight_bytes = 0, kv_bytes = 0;  // of this node
    std::vector<DeviceMemory> devices;        // likewise
  };
  // Waits until all have joined, loads and warms up, on all nodes at once. options.stages is of the whole pipeline.
  // Again after the executor has gone: followers that failed must join again. UNAVAILABLE naming the node that did not
  // come or was lost, DEADLINE_EXCEEDED naming one whose start hangs. options.on_start_hang hears of this node's when
  // followers have been told.
  StatusOr<Formed> Form(const Checkpoint& checkpoint, LocalExecutorOptions options);

 private:
  class Impl;
  explicit Leader(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A follower, from joining to the group's end. OK: the leader has stopped in order. FAILED_PRECONDITION: this node's
// terms are not the leader's. UNAVAILABLE: the group or the leader failed, or there was none within join_patience.
// DEADLINE_EXCEEDED: the start of another node hung. CANCELLED: options.cancelled said so. on_ready: when the group
// serves. A start that hangs is told to the leader before executor_options.on_start_hang hears of it.
Status Follow(const GroupOptions& options, const Checkpoint& checkpoint, LocalExecutorOptions executor_options,
              const std::function<void()>& on_ready);

}  // namespace altiplano::cluster

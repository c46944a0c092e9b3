// Egress: the one thread that owns every generation's state after arrival. Other threads only post notices; the engine
// wakes it once a step. It decodes, matches stop strings and starts at most one write for each stream.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/frontend/prepare.h"
#include "server/scheduler/step_plan.h"

namespace altiplano {

// A call inside this process; never reused.
using CallKey = uint64_t;

class EgressCall;

// What other threads tell a call.
struct Started {
  std::unique_ptr<EgressCall> call;
};
struct Prepared {
  std::string request_id;  // the client's where it can be used, else a UUID: for the log, of a refused request too
  StatusOr<PreparedRequest> request;
  std::shared_ptr<const Tokenizer> tokenizer;
};
struct ClientGone {};  // cancelled, disconnected or past its deadline
struct Killed {
  Status why;
};
struct WriteDone {
  bool ok = false;
};
struct CallDone {};  // gRPC is through with it
using Notice = std::variant<Event, Started, Prepared, ClientGone, Killed, WriteDone, CallDone>;

// One call as the egress thread sees it. All on that thread.
class EgressCall {
 public:
  virtual ~EgressCall() = default;
  virtual void OnNotice(Notice notice, TimePoint now) = 0;
  // After a batch of notices, or when next_timer() has come: send what can be sent.
  virtual void Flush(TimePoint now) = 0;
  virtual TimePoint next_timer() const = 0;  // kNever: none
};

// The mailbox. Outlives the thread behind it, so that the engine may go on posting. Any thread.
class EgressQueue {
 public:
  void Post(CallKey key, Notice notice);     // and wakes the thread
  void PostEvent(CallKey key, Event event);  // read at the next Wake
  void PostToAll(const Status& why);         // Killed, for each call
  void Wake();
  void Stop();

 private:
  friend class Egress;
  static constexpr CallKey kAll = 0;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::pair<CallKey, Notice>> notices_;
  bool awake_ = false;
  bool stop_ = false;
};

class Egress {
 public:
  Egress();
  // Every call must be done.
  ~Egress();

  const std::shared_ptr<EgressQueue>& queue() const { return queue_; }
  CallKey NewKey() { return ++last_key_; }

 private:
  struct Slot {
    std::unique_ptr<EgressCall> call;
    TimePoint timer = kNever;  // as entered in timers_
    bool dirty = false;
  };
  void Loop();
  bool Take(std::vector<std::pair<CallKey, Notice>>* notices);
  void Deliver(CallKey key, Notice notice, TimePoint now);
  void Touch(CallKey key, Slot* slot);
  void FlushDirty(TimePoint now);
  void FireTimers(TimePoint now);

  const std::shared_ptr<EgressQueue> queue_ = std::make_shared<EgressQueue>();
  std::atomic<CallKey> last_key_{0};

  // Egress thread only.
  std::unordered_map<CallKey, Slot> calls_;
  std::set<std::pair<TimePoint, CallKey>> timers_;
  std::vector<CallKey> dirty_;

  std::thread thread_;
};

}  // namespace altiplano

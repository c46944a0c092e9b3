// Watches: server streams that tell the latest state now and then (Health.Watch, WatchLoad). One thread looks at all of
// them; a slow reader misses states, never piles them up.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "server/base/clock.h"
#include "server/base/status.h"
#include "server/frontend/frontend_state.h"

namespace altiplano {

class WatchReactor;

class WatchHub {
 public:
  // `poll` also runs on the hub's thread at every turn, and says when it wants the next one.
  WatchHub(std::shared_ptr<LiveCounters> live, std::function<TimePoint(TimePoint)> poll);
  ~WatchHub();

  void Wake();                           // something may have changed
  void FinishAll(const Status& status);  // and later ones at once. Idempotent

 private:
  friend class WatchReactor;
  bool Add(WatchReactor* watcher);  // false: finished already
  void Remove(WatchReactor* watcher);
  void Loop();

  const std::shared_ptr<LiveCounters> live_;
  const std::function<TimePoint(TimePoint)> poll_;
  std::mutex mutex_;  // held while watchers are looked at; taken before theirs
  std::condition_variable wake_;
  std::set<WatchReactor*> watchers_;
  Status finished_;  // not OK: no more watching
  bool awake_ = false;
  bool stop_ = false;
  std::thread thread_;
};

// Deletes itself when gRPC is done with it.
class WatchReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  // `next`: the message to send at `now`, or nullopt when nothing is due. Hub's or gRPC's thread, one at a time.
  using Next = std::function<std::optional<grpc::ByteBuffer>(TimePoint now)>;
  WatchReactor(WatchHub* hub, Next next);

  void Look(TimePoint now);
  void End(const Status& status);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  WatchHub* const hub_;
  const Next next_;
  std::mutex mutex_;
  bool writing_ = false;
  bool ended_ = false;
  grpc::ByteBuffer outgoing_;
};

}  // namespace altiplano

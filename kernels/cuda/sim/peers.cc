// Ranks are OS threads, and a kernel of one waits for the others': their launches come together, and the last to come
// runs all of them.
#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "kernels/cuda/sim/sim.h"
#include "kernels/cuda/sim/stream.h"

namespace altiplano::sim {

namespace {

constexpr auto kLook = std::chrono::milliseconds(2);

// One launch of each rank.
struct Meeting {
  std::vector<std::vector<Kernel>> streams;
  std::vector<const void*> gpus;  // of those that have come
  int arrived = 0;
  bool running = false, done = false;
  std::string error;
};

std::mutex mutex;
std::condition_variable changed;
std::map<const void*, std::shared_ptr<Meeting>> meetings;  // of each group, the one that is not full

thread_local std::optional<std::vector<std::vector<Kernel>>> collected;

// A rank's launch and those on the same GPU that came before it.
void Join(Meeting& meeting, size_t rank, const void* gpu, Kernel kernel) {
  const bool shares = std::find(meeting.gpus.begin(), meeting.gpus.end(), gpu) != meeting.gpus.end();
  kernel.grid.shares_gpu = shares;
  meeting.gpus.push_back(gpu);
  meeting.streams[rank].push_back(std::move(kernel));
}

void RunWithPeers(const void* gpu, const PeerLaunch& launch, Kernel kernel) {
  const auto rank = static_cast<size_t>(launch.rank);
  if (collected) {
    collected->resize(std::max(collected->size(), static_cast<size_t>(launch.ranks)));
    (*collected)[rank].push_back(std::move(kernel));
    return;
  }
  if (!StuckError().empty()) return;
  std::unique_lock lock(mutex);
  std::shared_ptr<Meeting>& open = meetings[launch.group];
  if (open == nullptr) {
    open = std::make_shared<Meeting>();
    open->streams.resize(static_cast<size_t>(launch.ranks));
  }
  const std::shared_ptr<Meeting> meeting = open;
  Join(*meeting, rank, gpu, std::move(kernel));
  const bool last = ++meeting->arrived == launch.ranks;
  const auto until = std::chrono::steady_clock::now() + launch.patience;
  while (!last && !meeting->running && !launch.ended() && std::chrono::steady_clock::now() < until) {
    changed.wait_for(lock, kLook);
  }
  if (!meeting->running) {
    meeting->running = true;
    meetings.erase(launch.group);
    lock.unlock();
    std::string error = RunTogether(meeting->streams);
    lock.lock();
    meeting->error = std::move(error);
    meeting->done = true;
    changed.notify_all();
  }
  changed.wait(lock, [&] { return meeting->done; });
  if (!meeting->error.empty()) Stick(meeting->error);
}

}  // namespace

void Collect() {
  collected.emplace();
}

std::string RunCollected() {
  const std::vector<std::vector<Kernel>> streams = std::move(*collected);
  collected.reset();
  return RunTogether(streams);
}

void LaunchWithPeers(void* stream, const PeerLaunch& launch, const Kernel& kernel) {
  Issue(stream, [launch, kernel](void* on) { RunWithPeers(GpuOfStream(on), launch, kernel); });
}

}  // namespace altiplano::sim

#include "server/engine/start_watch.h"

#include <algorithm>
#include <utility>

#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr auto kLook = std::chrono::milliseconds(50);
constexpr auto kNoticePatience = std::chrono::seconds(5);

}  // namespace

StartPhase::StartPhase(std::string what, std::vector<std::string> ranks, Progress progress, TimePoint now)
    : what_(std::move(what)),
      ranks_(std::move(ranks)),
      progress_(std::move(progress)),
      seen_(Progresses()),
      since_(now) {}

std::vector<std::optional<uint64_t>> StartPhase::Progresses() const {
  std::vector<std::optional<uint64_t>> progresses;
  for (size_t index = 0; index < ranks_.size(); ++index) progresses.push_back(progress_(index));
  return progresses;
}

void StartPhase::GiveUp(const Status& why) {
  if (failure_.ok()) failure_ = why;
}

Status StartPhase::Look(TimePoint now, std::chrono::milliseconds patience) {
  const std::vector<std::optional<uint64_t>> progresses = Progresses();
  if (std::exchange(seen_, progresses) != progresses) since_ = now;
  if (!failure_.ok()) patience = std::min<std::chrono::milliseconds>(patience, kNoticePatience);
  if (now - since_ < patience) return OkStatus();
  std::string who;
  size_t hanging = 0;
  for (size_t index = 0; index < ranks_.size(); ++index) {
    if (!progresses[index]) continue;
    who += StrCat(hanging++ == 0 ? "" : ", ", ranks_[index]);
  }
  who = hanging == 0 ? "the start hangs"
                     : StrCat(hanging == 1 ? "rank " : "ranks ", who, hanging == 1 ? " hangs" : " hang");
  return Status(Code::kDeadlineExceeded, StrCat(who, " in ", what_, ": nothing has got on for ", patience.count(),
                                                " ms", failure_.ok() ? "" : StrCat(", and ", failure_.message())));
}

StartWatch::StartWatch(std::chrono::milliseconds patience, std::function<void(const Status&)> hung,
                       std::function<void(const std::string&)> began)
    : patience_(patience), hung_(std::move(hung)), began_(std::move(began)) {
  if (hung_ && patience_.count() > 0) thread_ = std::thread([this] { Loop(); });
}

StartWatch::~StartWatch() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void StartWatch::Begin(std::string what, std::vector<std::string> ranks, StartPhase::Progress progress) {
  if (began_) began_(what);
  std::lock_guard lock(mutex_);
  phase_.emplace(std::move(what), std::move(ranks), std::move(progress), Clock::Real().Now());
}

void StartWatch::GiveUp(const Status& why) {
  std::lock_guard lock(mutex_);
  if (phase_) phase_->GiveUp(why);
}

void StartWatch::End() {
  std::lock_guard lock(mutex_);
  phase_.reset();
}

void StartWatch::Loop() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kLook, [this] { return stop_; })) {
    if (!phase_) continue;
    const Status status = phase_->Look(Clock::Real().Now(), patience_);
    if (status.ok()) continue;
    lock.unlock();
    return hung_(status);
  }
}

}  // namespace altiplano

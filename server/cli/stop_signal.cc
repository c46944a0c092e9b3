#include "server/cli/stop_signal.h"

#include <pthread.h>

#include <csignal>
#include <cstring>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

// A terminal that closes says SIGHUP; nohup has it ignored, and so it stays.
bool HangUpStops() {
  struct sigaction action {};
  return sigaction(SIGHUP, nullptr, &action) == 0 && action.sa_handler != SIG_IGN;
}

sigset_t StopSet() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  if (HangUpStops()) sigaddset(&set, SIGHUP);
  return set;
}

}  // namespace

StopSignal::StopSignal(OnSignal on_signal) : on_signal_(std::move(on_signal)) {
  sigset_t set = StopSet();
  CHECK(pthread_sigmask(SIG_BLOCK, &set, nullptr) == 0);
  thread_ = std::thread([this] { Loop(); });
}

StopSignal::~StopSignal() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  pthread_kill(thread_.native_handle(), SIGTERM);  // wakes the wait; to that thread alone
  thread_.join();
}

void StopSignal::Loop() {
  sigset_t set = StopSet();
  for (;;) {
    int signal = 0;
    CHECK(sigwait(&set, &signal) == 0);
    int count = 0;
    const char* abbreviation = sigabbrev_np(signal);
    const std::string name = StrCat("SIG", abbreviation != nullptr ? abbreviation : "?");
    {
      std::lock_guard lock(mutex_);
      if (stop_) return;
      count = ++count_;
      if (count == 1) first_ = name;
    }
    changed_.notify_all();
    if (on_signal_) on_signal_(count, name);
  }
}

int StopSignal::count() {
  std::lock_guard lock(mutex_);
  return count_;
}

std::string StopSignal::first() {
  std::lock_guard lock(mutex_);
  return first_;
}

void StopSignal::WaitForCount(int count) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return count_ >= count; });
}

bool StopSignal::WaitForCount(int count, const std::function<bool()>& otherwise) {
  std::unique_lock lock(mutex_);
  bool other = false;
  changed_.wait(lock, [&] { return count_ >= count || (other = otherwise()); });
  return !other;
}

void StopSignal::Wake() {
  std::lock_guard lock(mutex_);  // else it could come between the question and the wait
  changed_.notify_all();
}

bool StopSignal::WaitForCount(int count, TimePoint deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline, [&] { return count_ >= count; });
}

}  // namespace altiplano::cli

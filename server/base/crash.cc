#include "server/base/crash.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <mutex>

#include "server/base/check.h"

namespace altiplano::crash {

namespace {

constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
constexpr size_t kStackBytes = 128 << 10;  // the frame of AVX-512 and AMX registers alone takes 11 KiB
constexpr int kPatienceMs = 10'000;        // of another thread that fails meanwhile

std::array<struct sigaction, kSignals.size()> before;  // the handlers; whoever was there before us
std::array<std::atomic<LastAct*>, Registration::kMost> acts;
std::atomic<bool> crashing, done;

void WaitUntilDone() {
  for (int ms = 0; ms < kPatienceMs && !done.load(std::memory_order_acquire); ++ms) {
    const timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
    nanosleep(&pause, nullptr);
  }
}

void Handle(int signal, siginfo_t* info, void*) {
  const int saved_errno = errno;
  if (!crashing.exchange(true)) {
    for (std::atomic<LastAct*>& act : acts) {
      if (LastAct* one = act.load(std::memory_order_acquire)) one->OnCrash(signal);
    }
    done.store(true, std::memory_order_release);
  } else {
    WaitUntilDone();
  }
  // What failed fails again on return, in its place, and the signal then does what it did before us. One that was sent
  // has to be sent again: it waits until this handler has returned.
  for (size_t i = 0; i < kSignals.size(); ++i) {
    if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
  }
  if (info->si_code <= 0) raise(signal);
  errno = saved_errno;
}

void InstallHandlers() {
  struct sigaction action {};
  action.sa_sigaction = Handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  // A handler that fails itself ends the process: the kernel does not wait for a blocked signal that is an
  // instruction's.
  for (int signal : kSignals) sigaddset(&action.sa_mask, signal);
  for (size_t i = 0; i < kSignals.size(); ++i) CHECK(sigaction(kSignals[i], &action, &before[i]) == 0);
}

}  // namespace

Registration::Registration(LastAct* act) {
  static std::once_flag installed;
  std::call_once(installed, InstallHandlers);
  for (; place_ < acts.size(); ++place_) {
    LastAct* none = nullptr;
    if (acts[place_].compare_exchange_strong(none, act)) return;
  }
  CHECK(!"more registrations than places");
}

Registration::~Registration() {
  acts[place_].store(nullptr);
}

SignalStack::SignalStack() {
  stack_t now{};
  if (sigaltstack(nullptr, &now) != 0 || (now.ss_flags & SS_DISABLE) == 0) return;
  memory_.resize(kStackBytes);
  stack_t stack{};
  stack.ss_sp = memory_.data();
  stack.ss_size = memory_.size();
  CHECK(sigaltstack(&stack, nullptr) == 0);
}

SignalStack::~SignalStack() {
  if (memory_.empty()) return;
  stack_t none{};
  none.ss_flags = SS_DISABLE;
  sigaltstack(&none, nullptr);
}

void Say(std::initializer_list<std::string_view> parts) noexcept {
  char line[1024];
  size_t size = 0;
  for (std::string_view part : parts) {
    const size_t count = std::min(part.size(), sizeof line - 1 - size);
    if (count > 0) std::memcpy(line + size, part.data(), count);
    size += count;
  }
  line[size++] = '\n';
  [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, line, size);  // nobody is left to tell
}

std::string_view SignalName(int signal) noexcept {
  switch (signal) {
    case SIGSEGV:
      return "SIGSEGV";
    case SIGBUS:
      return "SIGBUS";
    case SIGFPE:
      return "SIGFPE";
    case SIGILL:
      return "SIGILL";
    case SIGABRT:
      return "SIGABRT";
  }
  return "a signal";
}

Digits::Digits(unsigned long long value) noexcept {
  do {
    digits_[--first_] = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value > 0);
}

}  // namespace altiplano::crash

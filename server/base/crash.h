// What is still done when the process dies of a bug: of SIGSEGV, SIGBUS, SIGFPE, SIGILL or SIGABRT, and so of a failed
// CHECK and of std::terminate too. Afterwards it dies of that signal as it would have without, with its core.
#pragma once

#include <array>
#include <csignal>
#include <cstddef>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace altiplano::crash {

// Runs in the signal handler of the thread that failed, while the other threads go on: no allocation, no lock, no
// stdio.
class LastAct {
 public:
  virtual ~LastAct() = default;
  virtual void OnCrash(int signal) noexcept = 0;
};

// Has one done while it lives. The first one installs the signal handlers, in front of those that a sanitizer has
// installed. Any thread.
class Registration {
 public:
  static constexpr size_t kMost = 256;  // at a time; more are a bug

  explicit Registration(LastAct* act);
  Registration(const Registration&) = delete;
  ~Registration();

 private:
  size_t place_ = 0;
};

// For the handlers of the thread that makes it, while it lives: a stack of their own, so that they run even where the
// thread's has overflowed. A thread that has one already, as under ASan, keeps that.
class SignalStack {
 public:
  SignalStack();
  SignalStack(const SignalStack&) = delete;
  ~SignalStack();

 private:
  std::vector<std::byte> memory_;  // empty: not ours
};

// For handlers. One line on stderr, which other threads cannot interrupt; what exceeds 1 KiB is cut off.
void Say(std::initializer_list<std::string_view> parts) noexcept;
std::string_view SignalName(int signal) noexcept;  // "SIGSEGV"

// The digits of a number without an allocation.
class Digits {
 public:
  explicit Digits(unsigned long long value) noexcept;
  std::string_view text() const { return {digits_.data() + first_, digits_.size() - first_}; }

 private:
  std::array<char, 20> digits_{};
  size_t first_ = 20;
};

}  // namespace altiplano::crash

#include "server/base/crash.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <functional>
#include <string>
#include <thread>

#include "server/base/check.h"

namespace altiplano::crash {
namespace {

struct SaysSo : LastAct {
  void OnCrash(int signal) noexcept override { Say({"last act in ", SignalName(signal), " ", Digits(1907).text()}); }
};

// A sanitizer's handler comes after ours and ends the process in its way.
bool KilledBy(int signal, int status) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  (void)signal;
  return status != 0;
#else
  return WIFSIGNALED(status) && WTERMSIG(status) == signal;
#endif
}

// Not null itself, which the undefined behaviour sanitizer knows without a fault.
void StoreNowhere() {
  *reinterpret_cast<volatile int*>(64) = 1;
}

void DieOf(const std::function<void()>& bug) {
  const rlimit no_core{.rlim_cur = 0, .rlim_max = 0};
  setrlimit(RLIMIT_CORE, &no_core);
  SaysSo act;
  const Registration registration(&act);
  bug();
}

int Overflow(volatile char* before, int depth) {
  volatile char frame[4096];
  frame[0] = *before;
  return depth == 0 ? 0 : Overflow(frame, depth - 1) + frame[0];
}

TEST(CrashDeathTest, TheLastActComesBeforeTheSignalThatKills) {
  auto dies = [](int signal, const char* name, const std::function<void()>& bug) {
    EXPECT_EXIT(
        DieOf(bug), [=](int status) { return KilledBy(signal, status); }, std::string("last act in ") + name + " 1907");
  };
  dies(SIGSEGV, "SIGSEGV", StoreNowhere);
  dies(SIGABRT, "SIGABRT", [] { CHECK(std::string().size() == 1); });
  dies(SIGABRT, "SIGABRT", []() noexcept { (void)std::string().at(1); });
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) dies(signal, SignalName(signal).data(), [=] { raise(signal); });
}

TEST(CrashDeathTest, AThreadWhoseStackOverflowsStillHasOneForIt) {
  EXPECT_EXIT(
      DieOf([] {
        std::thread([] {
          const SignalStack stack;
          char none = 0;
          (void)Overflow(&none, 1 << 30);
        }).join();
      }),
      [](int status) { return KilledBy(SIGSEGV, status); }, "last act in SIGSEGV");
}

TEST(CrashDeathTest, AnActThatFailsItselfEndsTheProcess) {
  struct Fails : LastAct {
    void OnCrash(int) noexcept override { StoreNowhere(); }
  };
  EXPECT_EXIT(
      DieOf([] {
        Fails fails;
        const Registration second(&fails);
        raise(SIGSEGV);
      }),
      [](int status) { return KilledBy(SIGSEGV, status); }, "last act in SIGSEGV");
}

TEST(Crash, WhoHasLeftDoesNothing) {
  EXPECT_EXIT(
      {
        {
          DieOf([] {});
        }
        raise(SIGBUS);
      },
      [](int status) { return KilledBy(SIGBUS, status); }, testing::Not(testing::HasSubstr("last act")));
}

TEST(Crash, DigitsOfNumbers) {
  EXPECT_EQ(Digits(0).text(), "0");
  EXPECT_EQ(Digits(18'446'744'073'709'551'615ULL).text(), "18446744073709551615");
}

}  // namespace
}  // namespace altiplano::crash

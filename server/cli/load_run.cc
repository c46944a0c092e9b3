#include "server/cli/load_run.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/exit_code.h"
#include "server/cli/terminal.h"

namespace altiplano::cli {

std::string DescribeLoad(const LoadState& state) {
  const double seconds = Seconds(state.elapsed);
  return StrFormat("%.1f s: %zu of %zu sent, %zu running, %zu failed, %llu tokens, %.0f tok/s", seconds, state.sent,
                   state.total, state.running, state.failed, static_cast<unsigned long long>(state.tokens),
                   seconds > 0 ? static_cast<double>(state.tokens) / seconds : 0);
}

LoadStatePrinter::LoadStatePrinter(std::FILE* out)
    : out_(out),
      live_(TakesEscapes(out)),
      period_(live_ ? Duration(std::chrono::milliseconds(500)) : std::chrono::seconds(5)) {}

LoadStatePrinter::~LoadStatePrinter() {
  if (live_ && drawn_) std::fputs("\r\033[K", out_);
  std::fflush(out_);
}

void LoadStatePrinter::Print(const LoadState& state) {
  std::fprintf(out_, live_ ? "\r\033[K%s" : "%s\n", DescribeLoad(state).c_str());
  std::fflush(out_);
  drawn_ = true;
}

void LoadInterrupt::Interrupt() {
  std::lock_guard lock(mutex_);
  interrupted_ = true;
  if (on_interrupt_) std::exchange(on_interrupt_, nullptr)();
}

bool LoadInterrupt::interrupted() const {
  std::lock_guard lock(mutex_);
  return interrupted_;
}

LoadInterrupt::Watch::Watch(LoadInterrupt& interrupt, std::function<void()> on_interrupt) : interrupt_(interrupt) {
  std::lock_guard lock(interrupt_.mutex_);
  if (interrupt_.interrupted_) {
    on_interrupt();
  } else {
    interrupt_.on_interrupt_ = std::move(on_interrupt);
  }
}

LoadInterrupt::Watch::~Watch() {
  std::lock_guard lock(interrupt_.mutex_);
  interrupt_.on_interrupt_ = nullptr;
}

InterruptOnSignal::InterruptOnSignal(std::string_view command, LoadInterrupt* interrupt)
    : signal_([this, command, interrupt](int count, const std::string&) {
        if (count == 1 && armed_) return interrupt->Interrupt();
        Fail(command, count > 1 ? "interrupted again: ends without a report" : "interrupted before anything was sent",
             kExitInterrupted);
        _exit(kExitInterrupted);
      }) {}

namespace {

class LoadRun {
 public:
  LoadRun(const Load& load, LoadTarget& target, LoadInterrupt& interrupt, LoadStatePrinter* printer,
          bench::BenchReport* report)
      : load_(load),
        target_(target),
        interrupt_(interrupt),
        printer_(printer),
        report_(*report),
        begin_(Clock::Real().Now()),
        last_end_(begin_) {
    report_.requests.assign(load.dataset.requests.size(), {});
    if (printer_ != nullptr) next_print_ = begin_ + printer_->period();
  }

  void Run() {
    {
      LoadInterrupt::Watch watch(interrupt_, [this] { Interrupt(); });
      Send();
      std::unique_lock lock(mutex_);
      WaitFor(lock, [this] { return running_ == 0; });
    }
    Report();
  }

 private:
  void Send() {
    const auto most = static_cast<size_t>(report_.max_concurrency);
    std::unique_lock lock(mutex_);
    for (size_t i = 0; i < report_.requests.size(); ++i) {
      lock.unlock();
      std::function<void(LoadTarget::Done)> send = target_.Prepare(load_.dataset.requests[i]);
      lock.lock();
      const TimePoint due = begin_ + load_.arrivals[i];
      WaitUntil(lock, due);
      TimePoint ready = due;
      if (most > 0) {
        WaitFor(lock, [&] { return running_ < most || interrupted_; });
        ready = std::max(due, last_full_);
      }
      if (interrupted_) return;
      ++running_;
      ++sent_;
      lock.unlock();
      const TimePoint now = Clock::Real().Now();
      bench::RequestRecord times;
      times.start = now - begin_;
      times.held = ready - due;
      times.lag = now - ready;
      send([this, i, times](bench::RequestRecord record) { End(i, times, std::move(record)); });
      lock.lock();
    }
  }

  void Interrupt() {
    {
      std::lock_guard lock(mutex_);
      interrupted_ = true;
      changed_.notify_all();
    }
    target_.Cancel();  // ends of requests may come from within
  }

  // After the end: nothing else runs.
  void Report() {
    report_.duration = last_end_ - begin_;
    report_.EndAfter(sent_);
  }

  void End(size_t i, const bench::RequestRecord& times, bench::RequestRecord record) {
    record.start = times.start;
    record.held = times.held;
    record.lag = times.lag;
    const TimePoint now = Clock::Real().Now();
    std::lock_guard lock(mutex_);
    if (static_cast<int64_t>(running_) == report_.max_concurrency) last_full_ = now;
    --running_;
    record.cancelled = interrupted_ && record.error_code == CodeName(Code::kCancelled);
    failed_ += !record.ok && !record.cancelled;
    last_end_ = now;
    report_.requests[i] = std::move(record);
    changed_.notify_all();
  }

  template <typename Condition>
  void WaitFor(std::unique_lock<std::mutex>& lock, const Condition& condition) {
    while (!condition()) {
      if (printer_ == nullptr) {
        changed_.wait(lock);
      } else if (changed_.wait_until(lock, next_print_) == std::cv_status::timeout) {
        Print();
      }
    }
  }
  void WaitUntil(std::unique_lock<std::mutex>& lock, TimePoint due) {
    while (Clock::Real().Now() < due && !interrupted_) {
      changed_.wait_until(lock, std::min(due, next_print_));
      if (printer_ != nullptr && Clock::Real().Now() >= next_print_) Print();
    }
  }
  void Print() {
    printer_->Print({.total = report_.requests.size(),
                     .sent = sent_,
                     .running = running_,
                     .failed = failed_,
                     .tokens = target_.tokens(),
                     .elapsed = Clock::Real().Now() - begin_});
    next_print_ += printer_->period();
  }

  const Load& load_;
  LoadTarget& target_;
  LoadInterrupt& interrupt_;
  LoadStatePrinter* const printer_;
  bench::BenchReport& report_;  // its requests are guarded by mutex_ while the load runs
  const TimePoint begin_;
  TimePoint next_print_ = kNever;  // the sending thread's

  // Guarded by mutex_.
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t sent_ = 0, running_ = 0, failed_ = 0;
  TimePoint last_full_{};  // when max_concurrency requests last stopped running
  TimePoint last_end_;
  bool interrupted_ = false;
};

}  // namespace

void RunLoad(const Load& load, LoadTarget& target, LoadInterrupt& interrupt, LoadStatePrinter* printer,
             bench::BenchReport* report) {
  LoadRun(load, target, interrupt, printer, report).Run();
}

}  // namespace altiplano::cli

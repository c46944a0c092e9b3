#include "tests/bench/bench.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "server/base/strings.h"

namespace altiplano::bench {

namespace {

constexpr double kDisturbed = 0.02;  // of a sample's time
constexpr double kPatience = 0.03;   // seconds to wait for an undisturbed sample

double MedianOf(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double CpuSeconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double OwnSeconds() {
  return CpuSeconds(RUSAGE_SELF) + CpuSeconds(RUSAGE_CHILDREN);
}

// CPU seconds since the machine started: those that any process used, and those that the hypervisor kept.
struct MachineTime {
  double busy = 0, stolen = 0;
};
MachineTime ReadMachineTime() {
  std::ifstream stat("/proc/stat");
  std::string word;
  stat >> word;  // "cpu": the sum of all
  double user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0, steal = 0;
  stat >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal;
  const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
  return {(user + nice + system + irq + softirq) * tick, steal * tick};
}

}  // namespace

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double ThreadSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double Timing::best() const {
  std::vector<double> undisturbed;
  for (size_t i = 0; i < disturbed.size(); ++i) {
    if (!disturbed[i]) undisturbed.push_back(seconds[i]);
  }
  std::vector<double> sorted = undisturbed.empty() ? seconds : undisturbed;
  if (sorted.empty()) return 0;
  std::sort(sorted.begin(), sorted.end());
  return sorted[sorted.size() / 10];
}
double Timing::median() const {
  return MedianOf(seconds);
}
bool Timing::trusted() const {
  return std::find(disturbed.begin(), disturbed.end(), false) != disturbed.end();
}

double WaitedForCores() {
  double nanoseconds = 0;
  std::error_code error;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", error)) {
    std::ifstream schedstat(task.path() / "schedstat");
    double on_core = 0, waited = 0;
    if (schedstat >> on_core >> waited) nanoseconds += waited;
  }
  return nanoseconds * 1e-9;
}

std::vector<Timing> Interleave(const std::vector<std::function<void()>>& subjects, int rounds, double min_seconds) {
  std::vector<int> calls(subjects.size(), 1);
  auto run = [&](size_t i) {
    const double begin = Now();
    for (int call = 0; call < calls[i]; ++call) subjects[i]();
    return Now() - begin;
  };
  for (size_t i = 0; i < subjects.size(); ++i) {
    run(i);  // page faults, cold code, threads that sleep
    double took = run(i);
    while (took < min_seconds) {
      calls[i] =
          static_cast<int>(std::ceil(calls[i] * std::clamp(1.2 * min_seconds / std::max(took, 1e-7), 2.0, 100.0)));
      took = run(i);
    }
  }
  std::vector<Timing> timings(subjects.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < subjects.size(); ++i) {
      double took = 0, waited = 0;
      const double give_up = Now() + kPatience;
      for (bool first = true; first || (waited > kDisturbed * took && Now() < give_up); first = false) {
        const double before = WaitedForCores();
        took = run(i);
        waited = WaitedForCores() - before;
      }
      timings[i].seconds.push_back(took / calls[i]);
      timings[i].disturbed.push_back(waited > kDisturbed * took);
    }
  }
  return timings;
}

double MedianRatio(const Timing& of, const Timing& to) {
  std::vector<double> ratios;
  for (size_t i = 0; i < std::min(of.seconds.size(), to.seconds.size()); ++i) {
    ratios.push_back(of.seconds[i] / to.seconds[i]);
  }
  return MedianOf(std::move(ratios));
}

std::string Number(double value) {
  char text[32];
  const double size = std::abs(value);
  const int decimals = size >= 100 || size == 0 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4;
  std::snprintf(text, sizeof(text), "%.*f", decimals, value);
  return text;
}

Report::Report(std::string bench, int argc, char** argv, const std::vector<std::string>& options)
    : bench_(std::move(bench)) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const bool known = name == "--json" || std::find(options.begin(), options.end(), name) != options.end();
    if (!known || i + 1 == argc) {
      std::string usage = "usage: " + bench_ + "_bench [--json FILE]";
      for (const std::string& option : options) usage += " [" + option + " VALUE]";
      std::fprintf(stderr, "%s\n", usage.c_str());
      std::exit(64);
    }
    options_.emplace_back(name, argv[++i]);
  }
  json_path_ = option("--json");
  start_seconds_ = Now();
  start_own_ = OwnSeconds();
  const MachineTime machine = ReadMachineTime();
  start_busy_ = machine.busy;
  start_stolen_ = machine.stolen;
}

Report::~Report() {
  const MachineTime machine = ReadMachineTime();
  const double cores = static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  const double seconds = Now() - start_seconds_, available = std::max(1e-9, seconds * cores);
  const double others = std::max(0.0, (machine.busy - start_busy_) - (OwnSeconds() - start_own_)) / available;
  const double stolen = (machine.stolen - start_stolen_) / available;
  std::printf("\n%s: %.0f s; meanwhile others used %.0f %% of the cores' time, the hypervisor kept %.0f %%\n",
              bench_.c_str(), seconds, others * 100, stolen * 100);
  WriteLine(
      {{"bench", bench_}, {"name", "noise"}, {"seconds", seconds}, {"others_share", others}, {"stolen_share", stolen}});
}

std::string Report::option(const std::string& name, const std::string& otherwise) const {
  for (const auto& [key, value] : options_) {
    if (key == name) return value;
  }
  return otherwise;
}

void Report::Section(const std::string& title) {
  section_ = title;
  std::printf("\n%s\n", title.c_str());
}

void Report::Note(const std::string& sentence) {
  std::printf("  %s\n", sentence.c_str());
  std::fflush(stdout);
  WriteLine({{"bench", bench_}, {"section", section_}, {"note", sentence}});
}

void Report::Add(const Result& result) {
  const double ratio = result.ratio != 0 ? result.ratio : result.limit != 0 ? result.value / result.limit : 0;
  OrderedJson line = {
      {"bench", bench_}, {"section", section_}, {"name", result.name}, {"value", result.value}, {"unit", result.unit}};
  std::printf("  %-44s %9s %-9s", result.name.c_str(), Number(result.value).c_str(), result.unit.c_str());
  if (ratio != 0) {
    if (result.limit != 0) line["limit"] = result.limit;
    line["of"] = result.limit_name;
    line["ratio"] = ratio;
    std::printf(" %5.0f %%", ratio * 100);
    if (result.median_ratio != 0) {
      line["median_ratio"] = result.median_ratio;
      std::printf(" (median %.0f %%)", result.median_ratio * 100);
    }
    std::printf(" of %s", result.limit_name.c_str());
    if (result.limit != 0) std::printf(" %s", Number(result.limit).c_str());
  }
  std::optional<bool> met;
  if (result.at_least) {
    met = ratio >= *result.at_least;
    line["at_least"] = *result.at_least;
    std::printf("; goal >= %.0f %%: %s", *result.at_least * 100, *met ? "met" : "MISSED");
  }
  if (result.at_most) {
    met = ratio <= *result.at_most;
    line["at_most"] = *result.at_most;
    std::printf("; goal <= %.0f %%: %s", *result.at_most * 100, *met ? "met" : "MISSED");
  }
  if (met) line["met"] = *met;
  if (!result.trusted) {
    line["disturbed"] = true;
    std::printf("; disturbed in every round");
  }
  if (!result.remark.empty()) std::printf("; %s", result.remark.c_str());
  std::printf("\n");
  std::fflush(stdout);
  for (const auto& [key, value] : result.extra.items()) line[key] = value;
  WriteLine(line);
}

void Report::WriteLine(const OrderedJson& line) {
  if (json_path_.empty()) return;
  std::ofstream out(json_path_, std::ios::app);
  out << line.dump() << "\n";
}

}  // namespace altiplano::bench

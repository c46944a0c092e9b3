// What the benchmarks share: rounds that alternate between a limit and its subjects, and lines that state one against
// the other. The machine may be shared and noisy, so nothing here is a time alone: a limit is measured in the same
// rounds as what is held against it, and how much of the machine others took meanwhile is printed at the end.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "server/base/json.h"

namespace altiplano::bench {

// Seconds of one call, one for each round.
struct Timing {
  std::vector<double> seconds;
  std::vector<bool> disturbed;  // a thread of ours waited for a core in this round

  // Of the undisturbed rounds if there are any, the fastest but for a tenth of them: the luck of a single one is no
  // limit.
  double best() const;
  double median() const;
  bool trusted() const;  // an undisturbed round was among them
};

// Runs the subjects one after the other, `rounds` times over. In a round each is called as often as takes min_seconds
// (found out before the first round), so that the clock's grain does not show. A short sample that was disturbed is
// taken again, a few times.
std::vector<Timing> Interleave(const std::vector<std::function<void()>>& subjects, int rounds, double min_seconds);

// The median over the rounds of of / to, each round's two having run one after the other.
double MedianRatio(const Timing& of, const Timing& to);

// One measured thing.
struct Result {
  std::string name;
  double value = 0;
  std::string unit;
  // What it is held against, in the same unit; none when 0.
  double limit = 0;
  std::string limit_name;
  double ratio = 0;                // of the best rounds; 0: value / limit
  double median_ratio = 0;         // of the rounds; 0: not known
  std::optional<double> at_least;  // goals for `ratio`
  std::optional<double> at_most;
  bool trusted = true;                        // false: others disturbed every round of it
  OrderedJson extra = OrderedJson::object();  // into the JSON line; not printed
  std::string remark;                         // printed behind the line
};

// Reads the command line (--json FILE, and what the program declares), prints results as lines, appends them as JSON
// lines to FILE. The destructor says how busy others kept the machine.
class Report {
 public:
  // Exits with 64 and the usage on arguments that neither this nor `options` names.
  Report(std::string bench, int argc, char** argv, const std::vector<std::string>& options = {});
  ~Report();
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  std::string option(const std::string& name, const std::string& otherwise = "") const;

  void Section(const std::string& title);
  void Note(const std::string& sentence);
  void Add(const Result& result);

 private:
  void WriteLine(const OrderedJson& line);

  const std::string bench_;
  std::vector<std::pair<std::string, std::string>> options_;
  std::string section_;
  std::string json_path_;
  double start_seconds_ = 0;  // monotonic
  double start_own_ = 0;      // CPU seconds of this process and the children it waited for
  double start_busy_ = 0;     // CPU seconds of the machine
  double start_stolen_ = 0;   // CPU seconds that the hypervisor gave to others
};

double Now();            // seconds, monotonic
double ThreadSeconds();  // CPU time of the calling thread

// Seconds that all threads of this process have together been ready to run while others had the cores; 0 where the
// kernel does not tell.
double WaitedForCores();

// "12.3", "0.0123": three or more digits that say something.
std::string Number(double value);

}  // namespace altiplano::bench

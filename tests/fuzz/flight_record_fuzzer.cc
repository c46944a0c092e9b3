// Flight records from bytes: what follows the version, up to the checksum. Whatever is read can be shown, fitted and
// replayed.
#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/sha256.h"
#include "server/bench/flight_timeline.h"
#include "server/bench/step_cost_fit.h"
#include "server/scheduler/flight_record.h"
#include "server/scheduler/flight_replay.h"

namespace {

// What a record claims takes memory and time to run, however few its bytes are.
bool IsSmall(const altiplano::FlightRecord& record) {
  const altiplano::SchedulerOptions& options = record.options;
  int64_t work = 0;
  auto add = [&work](const altiplano::FlightArrival& arrival) {
    work += int64_t{arrival.prompt_tokens} + 1000 * int64_t{arrival.num_sequences};
  };
  for (const auto& frame : record.frames) {
    if (const auto* arrival = std::get_if<altiplano::FlightArrival>(&frame)) add(*arrival);
    const auto* checkpoint = std::get_if<altiplano::FlightCheckpoint>(&frame);
    if (checkpoint == nullptr) continue;
    for (const auto& request : checkpoint->requests) add(request.arrival);
  }
  return work < 1 << 20 && int64_t{options.num_blocks} * options.block_size < 1 << 16 &&
         options.max_running < 1 << 10 && options.token_budget < 1 << 16 && options.tenants.size() < 100;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  std::string file(kFlightMagic);
  for (int shift = 0; shift < 32; shift += 8) file.push_back(static_cast<char>(kFlightVersion >> shift));
  file.append(reinterpret_cast<const char*>(data), size);
  Sha256 sha;
  sha.Update(file.data(), file.size());
  const Sha256Digest digest = sha.Finish();
  file.append(reinterpret_cast<const char*>(digest.data()), digest.size());
  auto record = ParseFlightRecord(file);
  if (!record.ok()) {
    CHECK(!record.status().message().empty());
    return 0;
  }
  if (!IsSmall(*record)) return 0;
  const bench::FlightHistory history = bench::HistoryOf(*record);
  CHECK(bench::FlightTimeline(history, record->options, {}).ok());
  CHECK(ParseJson(bench::FlightTrace(history)).ok());
  (void)bench::FitStepCost(bench::MeasuredSteps(*record));
  (void)ReplayFlightRecord(*record);
  return 0;
}

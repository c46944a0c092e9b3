#include "server/engine/fault_drill.h"

#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "server/base/log.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

// The number before the next colon, which is taken off too.
template <typename Int>
bool TakeNumber(std::string_view* text, Int* number) {
  const size_t colon = text->find(':');
  if (colon == std::string_view::npos) return false;
  const char* end = text->data() + colon;
  const auto [at, error] = std::from_chars(text->data(), end, *number);
  text->remove_prefix(colon + 1);
  return error == std::errc() && at == end;
}

}  // namespace

StatusOr<std::function<void(int rank, uint64_t step)>> FaultDrillFromEnvironment() {
  const char* value = std::getenv("ALTIPLANO_FAULT");
  if (value == nullptr || *value == '\0') return std::function<void(int, uint64_t)>();
  std::string_view text = value;
  int victim = 0;
  uint64_t from_step = 0;
  if (!TakeNumber(&text, &victim) || !TakeNumber(&text, &from_step) || (text != "throw" && text != "hang")) {
    return Status(Code::kOutOfRange,
                  StrCat("ALTIPLANO_FAULT=", value, ": must be RANK:STEP:throw or RANK:STEP:hang, as 1:20:throw"));
  }
  log::Warn("a failure will be caused on purpose", {{"ALTIPLANO_FAULT", value}});
  const bool hang = text == "hang";
  auto done = std::make_shared<std::atomic<bool>>(false);
  return std::function<void(int, uint64_t)>([=](int rank, uint64_t step) {
    if (rank != victim || step < from_step || done->exchange(true)) return;
    if (!hang) throw std::runtime_error("failed on purpose (ALTIPLANO_FAULT)");
    log::Warn("hanging on purpose", {{"rank", rank}, {"step", step}});
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  });
}

}  // namespace altiplano

// setmaxnreg. A block starts with as many registers as its threads can all have, as a kernel does that is compiled with
// bounds for one block of a multiprocessor; what warps take comes from what others of the block have given back, and is
// waited for.
#include "kernels/cuda/sim/registers.h"

#include "kernels/cuda/sim/core.h"

namespace altiplano::sim {

namespace {

struct Argument {
  int registers;
  const char* operation;
  Site site;
};

void LanesAgree(void* const* arguments, uint32_t) {
  const auto& first = *static_cast<Argument*>(arguments[0]);
  for (int lane = 1; lane < kWarpSize; ++lane) {
    if (static_cast<Argument*>(arguments[lane])->registers == first.registers) continue;
    CurrentRunner().Fail(std::string(first.operation) + ": the lanes disagree on how many registers", first.site);
  }
}

// All lanes at one line for one number, in a whole warpgroup.
Runner& Align(int registers, const char* operation, Site site) {
  Runner& runner = CurrentRunner();
  if (runner.threads < (runner.current->warp / 4 + 1) * 4 * kWarpSize) {
    runner.Fail(std::string(operation) + " in a warpgroup of less than 128 threads", site);
  }
  Argument own = {registers, operation, site};
  runner.Meet(0xFFFFFFFF, LanesAgree, &own, operation, site, Meeting::kAligned);
  return runner;
}

}  // namespace

void GiveRegistersBack(int registers, Site site) {
  Runner& runner = Align(registers, "setmaxnreg.dec", site);
  Thread& self = *runner.current;
  if (registers > self.registers) {
    runner.Fail("setmaxnreg.dec to " + std::to_string(registers) + " registers, where a thread has " +
                    std::to_string(self.registers),
                site);
  }
  runner.pooled_registers += self.registers - registers;
  self.registers = registers;
  for (int i = 0; i < runner.threads; ++i) {
    if (runner.ThreadAt(i).wait == Wait::kRegisters) runner.Wake(runner.ThreadAt(i));
  }
}

void TakeRegisters(int registers, Site site) {
  Runner& runner = Align(registers, "setmaxnreg.inc", site);
  Thread& self = *runner.current;
  if (registers < self.registers) {
    runner.Fail("setmaxnreg.inc to " + std::to_string(registers) + " registers, where a thread has " +
                    std::to_string(self.registers),
                site);
  }
  self.wanted_registers = registers;
  while (runner.pooled_registers < registers - self.registers) runner.BlockOn(Wait::kRegisters, site);
  runner.pooled_registers -= registers - self.registers;
  self.registers = registers;
}

std::string UnevenRegisters(const Runner& runner) {
  for (int w = 0; w < runner.threads / kWarpSize; ++w) {
    const int first = w / 4 * 4;
    const int own = runner.ThreadAt(w * kWarpSize).registers, of_first = runner.ThreadAt(first * kWarpSize).registers;
    if (own == of_first) continue;
    return runner.Where() + ": warps " + std::to_string(first) + " and " + std::to_string(w) +
           " of a warpgroup end with " + std::to_string(of_first) + " and " + std::to_string(own) +
           " registers: one setmaxnreg was not for all";
  }
  return "";
}

}  // namespace altiplano::sim

// What the sanitizers must be told of fibers, of ordering and of accesses. Empty without the sanitizer.
//
// Under TSan the simulator itself is compiled without instrumentation: its bookkeeping is shared by all fibers on
// purpose. Only kernels are watched, and what the simulator does on their behalf is announced here.
#pragma once

#include <cstddef>

namespace altiplano::sim {

// A happens-before edge from each release of a token to each later acquire of it. Tokens are 8 bytes apart.
void TsanAcquire(void* token);
void TsanRelease(void* token);
// `pc`: a return address inside the kernel, or the report would not show the kernel's line.
void TsanRead(const void* data, size_t bytes, void* pc);
void TsanWrite(void* data, size_t bytes, void* pc);

void* TsanCreateFiber(const char* name);
void TsanDestroyFiber(void* fiber);
void* TsanCurrentFiber();
void TsanSwitchTo(void* fiber);  // makes no happens-before edge

// While one lives, what the running fiber does is not recorded: for containers of the simulator's.
class TsanIgnore {
 public:
  TsanIgnore();
  ~TsanIgnore();
  TsanIgnore(const TsanIgnore&) = delete;
  TsanIgnore& operator=(const TsanIgnore&) = delete;
};

void AsanPoison(void* data, size_t bytes);
void AsanUnpoison(void* data, size_t bytes);
// Around a switch of stacks: before it, with where the stack left keeps its state (null: it will not be returned to),
// and after it, on the new stack.
void AsanStartSwitch(void** fake_stack, const void* stack, size_t bytes);
void AsanFinishSwitch(void* fake_stack);

#define SIM_CALLER __builtin_return_address(0)

}  // namespace altiplano::sim

#include "kernels/cuda/sim/fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/sim/sanitizer.h"

// Saves the registers that a call must keep, swaps stacks and restores the other side's. x86-64 only, like the CPU
// kernels. The last jump is indirect because a `ret` would always be mispredicted: it returns to another caller.
extern "C" void altiplano_sim_switch_stack(void** save, void* load);
extern "C" void altiplano_sim_start_fiber();
asm(R"(
  .text
  .type altiplano_sim_switch_stack,@function
altiplano_sim_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rcx
  jmp *%rcx
  .size altiplano_sim_switch_stack,.-altiplano_sim_switch_stack
  .type altiplano_sim_start_fiber,@function
altiplano_sim_start_fiber:
  .cfi_startproc
  .cfi_undefined rip
  mov %r12,%rdi
  xor %ebp,%ebp
  call *%rbx
  ud2
  .cfi_endproc
  .size altiplano_sim_start_fiber,.-altiplano_sim_start_fiber
)");

namespace altiplano::sim {

void CreateFiber(Fiber* fiber, size_t stack_bytes, void (*entry)(void*), void* argument, unsigned color) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("simulator: no memory for a fiber's stack");
    std::abort();
  }
  fiber->stack = static_cast<char*>(memory) + page;
  fiber->stack_bytes = stack_bytes;
  auto* top = reinterpret_cast<uintptr_t*>(fiber->stack + stack_bytes - color * 448 % 8192);
  *--top = 0;  // two words, so that the stack is aligned at the call of entry
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&altiplano_sim_start_fiber);
  *--top = 0;                                      // rbp
  *--top = reinterpret_cast<uintptr_t>(entry);     // rbx
  *--top = reinterpret_cast<uintptr_t>(argument);  // r12
  for (int i = 13; i <= 15; ++i) *--top = 0;
  fiber->stack_pointer = top;
  char name[32];
  std::snprintf(name, sizeof(name), "CUDA thread %u", color);
  fiber->tsan = TsanCreateFiber(name);
}

void DestroyFiber(Fiber* fiber) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  TsanDestroyFiber(fiber->tsan);
  AsanUnpoison(fiber->stack, fiber->stack_bytes);  // whoever gets these addresses next would find frames' red zones
  munmap(fiber->stack - page, fiber->stack_bytes + page);
}

void AdoptThread(Fiber* fiber) {
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &fiber->stack_bytes);
  pthread_attr_destroy(&attributes);
  fiber->stack = static_cast<char*>(stack);
  fiber->tsan = TsanCurrentFiber();
}

void SwitchFiber(Fiber* from, Fiber* to) {
  AsanStartSwitch(&from->asan_fake_stack, to->stack, to->stack_bytes);
  TsanSwitchTo(to->tsan);
  altiplano_sim_switch_stack(&from->stack_pointer, to->stack_pointer);
  AsanFinishSwitch(from->asan_fake_stack);
}

void EnterFiber() {
  AsanFinishSwitch(nullptr);
}

}  // namespace altiplano::sim

// A fiber: the stack and the saved registers of one simulated CUDA thread. Tells the sanitizers of every switch.
#pragma once

#include <cstddef>

namespace altiplano::sim {

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  char* stack = nullptr;          // lowest usable address
  size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
};

// Gives `fiber` a stack, with an unreadable page below it, on which entry(argument) will run. entry never returns.
// `color` shifts the first frame: stacks begin at the same offset of a page, and hundreds of hot frames would otherwise
// share a few sets of the cache.
void CreateFiber(Fiber* fiber, size_t stack_bytes, void (*entry)(void*), void* argument, unsigned color);
// Of a fiber that runs no more.
void DestroyFiber(Fiber* fiber);
// Describes the running thread's own stack, so that fibers can switch back to it.
void AdoptThread(Fiber* fiber);
// Suspends `from`, which runs, and resumes `to`. No happens-before edge.
void SwitchFiber(Fiber* from, Fiber* to);
// The first thing that a fiber's entry calls.
void EnterFiber();

}  // namespace altiplano::sim

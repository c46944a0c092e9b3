#include "kernels/cuda/sim/sanitizer.h"

// Set by the build, because this file is compiled without -fsanitize=thread even where the kernels are.
#ifdef ALTIPLANO_SIM_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void __tsan_read_range_pc(void* data, unsigned long bytes, void* pc);
void __tsan_write_range_pc(void* data, unsigned long bytes, void* pc);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#ifdef ALTIPLANO_SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace altiplano::sim {

#ifdef ALTIPLANO_SIM_TSAN
void TsanAcquire(void* token) {
  __tsan_acquire(token);
}
void TsanRelease(void* token) {
  __tsan_release(token);
}
void TsanRead(const void* data, size_t bytes, void* pc) {
  __tsan_read_range_pc(const_cast<void*>(data), bytes, pc);
}
void TsanWrite(void* data, size_t bytes, void* pc) {
  __tsan_write_range_pc(data, bytes, pc);
}
void* TsanCreateFiber(const char* name) {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
void TsanDestroyFiber(void* fiber) {
  __tsan_destroy_fiber(fiber);
}
void* TsanCurrentFiber() {
  return __tsan_get_current_fiber();
}
void TsanSwitchTo(void* fiber) {
  constexpr unsigned kNoSync = 1;
  __tsan_switch_to_fiber(fiber, kNoSync);
}
TsanIgnore::TsanIgnore() {
  __tsan_ignore_thread_begin();
}
TsanIgnore::~TsanIgnore() {
  __tsan_ignore_thread_end();
}
#else
void TsanAcquire(void*) {}
void TsanRelease(void*) {}
void TsanRead(const void*, size_t, void*) {}
void TsanWrite(void*, size_t, void*) {}
void* TsanCreateFiber(const char*) {
  return nullptr;
}
void TsanDestroyFiber(void*) {}
void* TsanCurrentFiber() {
  return nullptr;
}
void TsanSwitchTo(void*) {}
TsanIgnore::TsanIgnore() {}
TsanIgnore::~TsanIgnore() {}
#endif

#ifdef ALTIPLANO_SIM_ASAN
void AsanPoison(void* data, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(data, bytes);
}
void AsanUnpoison(void* data, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
}
void AsanStartSwitch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void AsanFinishSwitch(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
void AsanPoison(void*, size_t) {}
void AsanUnpoison(void*, size_t) {}
void AsanStartSwitch(void**, const void*, size_t) {}
void AsanFinishSwitch(void*) {}
#endif

}  // namespace altiplano::sim

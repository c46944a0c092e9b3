// Counts what each thread asks operator new for. Defines it: for one source file of a program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {
thread_local int64_t allocations = 0;
}

// Not inlined: else the compiler sees free() meet a pointer of new and warns.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes)) return p;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

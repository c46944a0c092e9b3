// PlanPool: StepPlans whose memory is used again once nobody holds them, that of their reference counts included: a
// step like those before it allocates nothing. Plans may be let go on any thread, also after the pool has died.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "server/scheduler/step_plan.h"

namespace altiplano {

class PlanPool {
 public:
  // An empty plan with the capacity of an earlier one.
  std::shared_ptr<StepPlan> Get();

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p); }
  };
  struct Spare {
    std::mutex mutex;
    std::vector<std::unique_ptr<StepPlan>> plans;     // guarded by mutex
    std::vector<std::unique_ptr<void, Free>> counts;  // guarded by mutex: memory of a shared_ptr's count each
  };
  // Gives a shared_ptr the memory of its count.
  template <typename T>
  struct CountAllocator {
    using value_type = T;
    explicit CountAllocator(std::shared_ptr<Spare> from) : spare(std::move(from)) {}
    template <typename U>
    CountAllocator(const CountAllocator<U>& other) : spare(other.spare) {}  // NOLINT: as allocators convert

    T* allocate(size_t n) {
      std::unique_lock lock(spare->mutex);
      if (!spare->counts.empty()) {
        void* memory = spare->counts.back().release();
        spare->counts.pop_back();
        return static_cast<T*>(memory);
      }
      lock.unlock();
      return static_cast<T*>(::operator new(n * sizeof(T)));
    }
    void deallocate(T* memory, size_t) {
      std::lock_guard lock(spare->mutex);
      spare->counts.emplace_back(memory);
    }
    template <typename U>
    bool operator==(const CountAllocator<U>& other) const {
      return spare == other.spare;
    }

    std::shared_ptr<Spare> spare;
  };
  std::shared_ptr<Spare> spare_ = std::make_shared<Spare>();
};

}  // namespace altiplano

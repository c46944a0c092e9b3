// Executor: runs planned steps on the ranks. The engine's only view of devices.
#pragma once

#include <functional>
#include <memory>

#include "server/scheduler/step_plan.h"

namespace altiplano {

class Executor {
 public:
  virtual ~Executor() = default;
  // Starts a step and returns at once. At most one step may be waiting behind the running one, and none is started any
  // more once Wait has told of an error. Engine thread.
  virtual void Launch(std::shared_ptr<const StepPlan> plan) = 0;
  // Blocks until the oldest launched step has ended. Engine thread.
  virtual StepResult Wait() = 0;
  // `failed` is called, from any thread, when the devices are lost while no step runs. Engine thread, before the first
  // Launch; for executors that can tell.
  virtual void OnFailure(std::function<void(Status)> /*failed*/) {}
  // After a failure: whether this process could make another one in its place. Engine thread.
  virtual bool replaceable() const { return true; }
};

}  // namespace altiplano

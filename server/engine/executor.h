// Executor: runs planned steps on the ranks. The engine's only view of devices.
#pragma once

#include <memory>

#include "server/scheduler/step_plan.h"

namespace altiplano {

// What an executor tells beside the results of steps. Any thread.
class ExecutorObserver {
 public:
  virtual ~ExecutorObserver() = default;
  virtual void OnFailure(Status why) = 0;   // the devices are lost while no step runs
  virtual void OnProgress() = 0;            // the step that runs has got further
  virtual void OnSilence(bool silent) = 0;  // some devices have not been heard of for long, or all have been again
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Starts a step and returns at once. At most one step may be waiting behind the running one, and none is started any
  // more once Wait has told of an error. Engine thread.
  virtual void Launch(std::shared_ptr<const StepPlan> plan) = 0;
  // Blocks until the oldest launched step has ended. Engine thread.
  virtual StepResult Wait() = 0;
  // Of executors that can tell. Engine thread, before the first Launch; the observer outlives the executor.
  virtual void Watch(ExecutorObserver* /*observer*/) {}
  // After a failure: whether this process could make another one in its place. Engine thread.
  virtual bool replaceable() const { return true; }
};

}  // namespace altiplano

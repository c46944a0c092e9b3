// Plans and results as messages between nodes. What comes may be anything.
#pragma once

#include <memory>

#include "altiplano/cluster/v1/cluster.pb.h"
#include "server/scheduler/step_plan.h"

namespace altiplano::cluster {

void PlanToProto(const StepPlan& plan, v1::Plan* out);
// Of a request, what an executor reads; its id and times are not sent. Null: what belongs together is not of one
// length. Whether it can be carried out, PlanCheck knows.
std::shared_ptr<const StepPlan> PlanFromProto(const v1::Plan& plan);

void ResultToProto(const StepResult& result, v1::StepDone* out);
// One that is not of one length is an INTERNAL error.
StepResult ResultFromProto(const v1::StepDone& done);

}  // namespace altiplano::cluster

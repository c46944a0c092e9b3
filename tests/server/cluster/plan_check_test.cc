// Plans that were broken on their way, one field of theirs at random: whatever PlanCheck lets pass a real executor
// carries out without an access that ASan knows of, and without a broken invariant.
#include "server/scheduler/plan_check.h"

#include <google/protobuf/message.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "server/base/strings.h"
#include "server/cluster/plan_proto.h"
#include "tests/server/engine/parallel_testlib.h"

namespace altiplano::cluster {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

class Breaker {
 public:
  explicit Breaker(uint32_t seed) : random_(seed) {}

  // Some number of some message in it.
  void Break(Message* message) {
    const auto* reflection = message->GetReflection();
    const auto* descriptor = message->GetDescriptor();
    const FieldDescriptor* field = descriptor->field(Below(descriptor->field_count()));
    if (field->is_repeated()) {
      const int size = reflection->FieldSize(*message, field);
      if (size == 0 || Below(8) == 0) return Lengthen(message, field);
      const int at = Below(size);
      if (field->type() == FieldDescriptor::TYPE_MESSAGE) {
        return Break(reflection->MutableRepeatedMessage(message, field, at));
      }
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32) {
        reflection->SetRepeatedInt32(message, field, at, Number(reflection->GetRepeatedInt32(*message, field, at)));
      } else {
        reflection->SetRepeatedFloat(message, field, at, Float());
      }
      return;
    }
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->SetInt32(message, field, Number(reflection->GetInt32(*message, field)));
      case FieldDescriptor::CPPTYPE_BOOL:
        return reflection->SetBool(message, field, !reflection->GetBool(*message, field));
      case FieldDescriptor::CPPTYPE_FLOAT:
        return reflection->SetFloat(message, field, Float());
      case FieldDescriptor::CPPTYPE_MESSAGE:
        return Break(reflection->MutableMessage(message, field));
      default:  // keys, seeds and the step's number
        return;
    }
  }

 private:
  void Lengthen(Message* message, const FieldDescriptor* field) {
    const auto* reflection = message->GetReflection();
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32) reflection->AddInt32(message, field, Number(0));
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_FLOAT) reflection->AddFloat(message, field, Float());
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) reflection->AddMessage(message, field);
  }
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  int32_t Number(int32_t old) {
    switch (Below(5)) {
      case 0:
        return std::numeric_limits<int32_t>::max();
      case 1:
        return std::numeric_limits<int32_t>::min();
      case 2:
        return Below(300);
      default:
        return static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(Below(7)) - 3);
    }
  }
  float Float() {
    const float values[] = {-1, 0, 1e30f, std::numeric_limits<float>::quiet_NaN()};
    return values[Below(4)];
  }

  std::mt19937 random_;
};

TEST(BrokenPlans, AreRefusedOrHarmless) {
  const auto checkpoint = std::move(*Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny")));
  const auto executor = std::move(*LocalExecutor::Create(*checkpoint, TinyOptions(1)));
  const SchedulerOptions options = executor->scheduler_options();
  const auto vocab = static_cast<TokenId>(checkpoint->config().vocab);
  int refused = 0, harmless = 0;
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(StrCat("seed ", seed));
    const auto scheduler = std::move(*Scheduler::Create(options));
    PlanCheck check(options, vocab);
    std::vector<Event> events;
    for (int i = 0; i < 4; ++i) {
      auto request = MakeRequest(i, 5 + 17 * i, 6);
      request->sampling.logit_bias = {{3, 1.0f}};
      if (i % 2 == 1) request->sampling.repetition_penalty = 1.3f;
      if (i == 2) request->sampling.prompt_top_logprobs = 2;
      scheduler->Add(static_cast<RequestKey>(i + 1), request);
    }
    for (uint32_t step = 0; step <= seed % 8; ++step) {
      const std::shared_ptr<const StepPlan> plan = scheduler->Plan(TimePoint(), &events);
      ASSERT_NE(plan, nullptr);
      v1::Plan message;
      PlanToProto(*plan, &message);
      const bool last = step == seed % 8;
      if (last) Breaker(seed).Break(&message);
      const auto sent = PlanFromProto(message);
      const std::string wrong = sent == nullptr ? "lengths" : check.Check(*sent);
      ASSERT_TRUE(last || wrong.empty()) << wrong;
      refused += !wrong.empty();
      if (!wrong.empty()) break;
      harmless += last;
      executor->Launch(sent);
      const StepResult result = executor->Wait();
      ASSERT_TRUE(result.status.ok()) << result.status.ToString();
      if (!last) scheduler->Apply(*plan, result, TimePoint(), &events);
    }
  }
  EXPECT_GT(refused, 100);
  EXPECT_GT(harmless, 30);
}

}  // namespace
}  // namespace altiplano::cluster

#include "server/bench/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "server/base/json.h"

namespace altiplano::bench {
namespace {

using testing::HasSubstr;

TEST(Machines, TheFileInConfigIsAPreset) {
  auto machine = FindMachine(ALTIPLANO_SOURCE_DIR "/config/step_cost.json");
  ASSERT_TRUE(machine.ok()) << machine.status().ToString();
  auto preset = FindMachine("8b-h200");
  ASSERT_TRUE(preset.ok());
  EXPECT_EQ(machine->description, preset->description);
  EXPECT_EQ(machine->kv_tokens, preset->kv_tokens);
  const StepWork small = {.sequences = 3, .tokens = 7, .decode_context = 1000, .prefill_context = 50000};
  const StepWork large = {.sequences = 3, .tokens = 70000, .decode_context = 1000, .prefill_context = 50000};
  EXPECT_EQ(StepTime(machine->cost, small), StepTime(preset->cost, small));
  EXPECT_EQ(StepTime(machine->cost, large), StepTime(preset->cost, large));
}

TEST(Machines, WhatIsWrittenIsReadBack) {
  for (const Machine& preset : MachinePresets()) {
    auto machine = ParseMachine(ToJson(preset).dump());
    ASSERT_TRUE(machine.ok()) << machine.status().ToString();
    EXPECT_EQ(ToJson(*machine), ToJson(preset));
  }
}

// One stream at a time, as published for these machines, to the accuracy that a formula can have.
TEST(Machines, PresetsAreNearPublishedSpeeds) {
  auto one_stream = [](const char* name) {
    return 1 / Seconds(StepTime(FindMachine(name)->cost, {.sequences = 1, .tokens = 1, .decode_context = 1000}));
  };
  EXPECT_NEAR(one_stream("8b-h200"), 215, 25);    // an 8B of this class serves 166 to 215 tokens a second
  EXPECT_NEAR(one_stream("405b-8xh200"), 60, 5);  // 57 without drafts
}

TEST(Machines, BadFilesAreRefusedByField) {
  std::stringstream text;
  text << std::ifstream(ALTIPLANO_SOURCE_DIR "/config/step_cost.json").rdbuf();
  auto refusal = [&](auto change) {
    Json json = *ParseJson(text.str());
    change(json);
    auto machine = ParseMachine(json.dump());
    EXPECT_EQ(machine.status().code(), Code::kInvalidArgument);
    return machine.status().message();
  };
  EXPECT_THAT(refusal([](Json& j) { j.erase("token_us"); }), HasSubstr("token_us must be a number"));
  EXPECT_THAT(refusal([](Json& j) { j["step_us"] = -1; }), HasSubstr("step_us must be a number"));
  EXPECT_THAT(refusal([](Json& j) { j["kv_tokens"] = 0; }), HasSubstr("kv_tokens must be a whole number"));
  EXPECT_THAT(refusal([](Json& j) { j.erase("description"); }), HasSubstr("description must be"));
  EXPECT_THAT(refusal([](Json& j) { j["speed"] = 1; }), HasSubstr("\"speed\" is not a field"));
  EXPECT_THAT(refusal([](Json& j) { j["step_us"] = j["weights_us"] = j["token_us"] = 0; }), HasSubstr("take time"));
  EXPECT_THAT(refusal([](Json& j) { j = 5; }), HasSubstr("must be a JSON object"));
  EXPECT_THAT(FindMachine("9b-h100").status().message(), HasSubstr("no preset but 8b-h100, 8b-h200"));
}

}  // namespace
}  // namespace altiplano::bench

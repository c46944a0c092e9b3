#include "server/bench/capacity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/bench/machine.h"
#include "server/model/llama.h"

namespace altiplano::bench {
namespace {

using testing::HasSubstr;

ModelConfig Published(std::string_view name) {
  return PublishedModelConfig(name).value();
}

Capacity Plan(std::string_view model, std::string_view gpus, Demand demand = {}) {
  return PlanCapacity(Published(model), ParseGpus(gpus).value(), demand, {});
}

TEST(PublishedModels, HaveTheirParameters) {
  EXPECT_EQ(Published("1b").parameters(), 1'235'814'400u);
  EXPECT_EQ(Published("3b").parameters(), 3'212'749'824u);
  EXPECT_EQ(Published("8b").parameters(), 8'030'261'248u);
  EXPECT_EQ(Published("70b").parameters(), 70'553'706'496u);
  EXPECT_EQ(Published("405b").parameters(), 405'853'388'800u);
  EXPECT_FALSE(PublishedModelConfig("13b").has_value());
  for (const char* name : {"1b", "3b", "8b", "70b", "405b"}) EXPECT_TRUE(CheckModelConfig(Published(name)).ok());
}

TEST(ParseGpus, NumberAndKind) {
  EXPECT_EQ(ParseGpus("8xH200")->count, 8);
  EXPECT_EQ(ParseGpus("8xh200")->gpu.name, "H200");
  EXPECT_EQ(ParseGpus("H100")->count, 1);
  EXPECT_EQ(ParseGpus("4xa100-80gb")->gpu.name, "A100-80GB");
  EXPECT_EQ(ParseGpus("l40s")->gpu.memory_bytes, 48e9);
  EXPECT_EQ(ParseGpus("2xL4")->gpu.memory_bytes, 24e9);
  for (const char* bad : {"", "8x", "0xH100", "-1xH100", "xH100", "8xB200", "8H200", "99999xH100", "A100", "L40"}) {
    EXPECT_THAT(ParseGpus(bad).status().message(), HasSubstr("H100, H200, A100-40GB, A100-80GB, L4, L40S")) << bad;
  }
}

TEST(AllReduces, AreThoseThatTheModelMakes) {
  const AllReduces large = AllReducesOf(Published("405b"), 8);
  EXPECT_EQ(large.calls, 2 * 126 + 1);
  EXPECT_EQ(large.token_bytes, 16384 * sizeof(float));
  EXPECT_NEAR(OneTokenUs(large, ParseGpus("H200")->gpu), 9.07, 0.01);
  EXPECT_NEAR(OneTokenUs(AllReducesOf(Published("70b"), 8), ParseGpus("H100")->gpu), 7.8, 1e-9);
  EXPECT_EQ(AllReducesOf(Published("70b"), 1).calls, 0);
  int64_t of_stages = 0;
  for (int stage = 0; stage < 4; ++stage) {
    of_stages += Llama::AllReduces(Published("405b"), Shard::Make(Published("405b"), 0, 8, stage, 4).value());
  }
  EXPECT_EQ(of_stages, large.calls);
}

// Of 405B on eight H200: beside the sum before qkv 144 blocks have 2 KiB of each row in registers' way and 7 KiB in
// L2's, beside that before gate and up 832 have 1 KiB and 1152 bytes, at 3.6 TB/s; the head's would take longer than
// the sum.
TEST(AllReduces, HideWeights) {
  const Gpu h200 = ParseGpus("H200")->gpu;
  const double qkv = 144 * 16 * (2048 + 7168) / 3.6e6, gate_up = 832 * 16 * (1024 + 1152) / 3.6e6;
  EXPECT_LT(qkv, 9.07);
  EXPECT_LT(gate_up, 9.07);
  const ModelConfig large = Published("405b");
  EXPECT_NEAR(HiddenWeightsUs(large, h200, 8), 126 * (qkv + gate_up) + OneTokenUs(AllReducesOf(large, 8), h200), 1);
  EXPECT_EQ(HiddenWeightsUs(Published("8b"), h200, 1), 0) << "no sums";
  // No more than the sums take, whatever is on its way.
  for (const char* model : {"8b", "70b"}) {
    const AllReduces sums = AllReducesOf(Published(model), 2);
    const Gpu slow = {.name = "slow", .bytes_per_second = 1e9, .link_bytes_per_second = 900e9};
    EXPECT_LE(HiddenWeightsUs(Published(model), slow, 2),
              static_cast<double>(sums.calls) * OneTokenUs(sums, slow) * 1.0001);
  }
  // Reading weights takes so much less.
  const double all = 2.0 * 50.47e9 / 3.6e6;
  EXPECT_NEAR(DeriveStepCost(large, h200, 8).weights_us, all - HiddenWeightsUs(large, h200, 8), 0.001 * all);
}

// What grows with the message is 14 times as much over PCIe 4.0 as over the links of an H100; what does not is the
// same.
TEST(AllReduces, TakeLongerWhereLinksAreSlower) {
  const AllReduces sums = AllReducesOf(Published("70b"), 4);
  const double fixed = 7.8 - (16.7 - 7.8) * 32 / (256 - 32);
  EXPECT_NEAR(OneTokenUs(sums, ParseGpus("L40S")->gpu), fixed + (7.8 - fixed) * 900 / 64, 1e-9);
  EXPECT_NEAR(OneTokenUs(sums, ParseGpus("A100-80GB")->gpu), fixed + (7.8 - fixed) * 900 / 600, 1e-9);
  EXPECT_EQ(OneTokenUs(AllReducesOf(Published("70b"), 1), ParseGpus("L40S")->gpu), 0);
  // For each token of a prompt 161 messages of 32 KiB, at 64 / 900 of 64 MiB in 316 us.
  const StepCost l40s = DeriveStepCost(Published("70b"), ParseGpus("L40S")->gpu, 4);
  const double matrices = DeriveStepCost(Published("70b"), ParseGpus("L40S")->gpu, 1).token_us / 4;
  EXPECT_NEAR(l40s.token_us - matrices, 161 * 32768 / (67108864 / 316.0 * 64 / 900), 0.01);
}

// Of the datasheets' figures, the same shares as on Hopper.
TEST(StepCost, OfOtherGpus) {
  const StepCost h100 = DeriveStepCost(Published("8b"), ParseGpus("H100")->gpu, 1);
  const auto holds = [&](const char* name, double bytes_per_second, double flops) {
    const StepCost cost = DeriveStepCost(Published("8b"), ParseGpus(name)->gpu, 1);
    EXPECT_NEAR(cost.weights_us, h100.weights_us * 3.35e12 / bytes_per_second, 1e-6 * cost.weights_us) << name;
    EXPECT_NEAR(cost.kv_token_us, h100.kv_token_us * 3.35e12 / bytes_per_second, 1e-6 * cost.kv_token_us) << name;
    EXPECT_NEAR(cost.token_us, h100.token_us * 989.4e12 / flops, 1e-6 * cost.token_us) << name;
    EXPECT_NEAR(cost.attention_us, h100.attention_us * 989.4e12 / flops, 1e-6 * cost.attention_us) << name;
  };
  holds("A100-40GB", 1.555e12, 312e12);
  holds("A100-80GB", 2.039e12, 312e12);
  holds("L4", 300e9, 121e12);
  holds("L40S", 864e9, 362.05e12);
}

TEST(Plan, SmallerGpusHoldLess) {
  EXPECT_EQ(Plan("8b", "L4").why_not, "");
  EXPECT_LT(Plan("8b", "L4").kv_tokens, Plan("8b", "A100-40GB").kv_tokens);
  EXPECT_LT(Plan("8b", "A100-40GB").kv_tokens, Plan("8b", "L40S").kv_tokens);
  EXPECT_EQ(Plan("70b", "2xA100-80GB", {.context = 1024}).why_not, Plan("70b", "2xH100", {.context = 1024}).why_not);
  EXPECT_THAT(Plan("70b", "4xA100-40GB").why_not, HasSubstr("tokens"));
  EXPECT_EQ(Plan("70b", "4xL40S").why_not, "");
}

// The presets were computed apart from this code.
TEST(StepCost, EqualsThePresets) {
  auto near = [](double a, double b) { EXPECT_NEAR(a, b, 0.002 * b); };
  for (const char* gpu : {"h100", "h200"}) {
    const StepCost derived = DeriveStepCost(Published("8b"), ParseGpus(gpu)->gpu, 1);
    const StepCost preset = FindMachine(std::string("8b-") + gpu)->cost;
    near(derived.step_us, preset.step_us);
    near(derived.weights_us, preset.weights_us);
    near(derived.token_us, preset.token_us);
    near(derived.kv_token_us, preset.kv_token_us);
    near(derived.attention_us, preset.attention_us);
  }
  // Those of 8 GPUs have FP8 weights: other terms are the same.
  for (const char* model : {"70b", "405b"}) {
    const StepCost derived = DeriveStepCost(Published(model), ParseGpus("H200")->gpu, 8);
    const StepCost preset = FindMachine(std::string(model) + "-8xh200")->cost;
    near(derived.step_us, preset.step_us);
    near(derived.kv_token_us, preset.kv_token_us);
    near(derived.attention_us, preset.attention_us);
  }
}

TEST(Plan, SizesOfAGpu) {
  const Capacity plan = Plan("405b", "8xH200");
  EXPECT_EQ(plan.why_not, "");
  EXPECT_NEAR(static_cast<double>(plan.weight_bytes), 101.5e9, 0.1e9);
  EXPECT_EQ(plan.block_bytes, 64u * 64'512u);
  // The memory is spent to less than a block.
  const uint64_t blocks = static_cast<uint64_t>(plan.kv_tokens) / 64;
  const uint64_t spent = plan.weight_bytes + plan.workspace_bytes + blocks * plan.block_bytes;
  EXPECT_LE(spent, plan.usable_bytes);
  EXPECT_GT(spent + plan.block_bytes, plan.usable_bytes);
}

TEST(Plan, StagesShareOutTheLayers) {
  const GpuGroup gpus = ParseGpus("8xH100").value();
  const ModelConfig c = Published("70b");
  const Capacity one = PlanCapacity(c, gpus, {}, {}), two = PlanCapacity(c, gpus, {}, {.stages = 2});
  EXPECT_EQ(two.why_not, "");
  // Two stages of 4: half of the layers on half as many ranks.
  EXPECT_NEAR(static_cast<double>(two.weight_bytes), static_cast<double>(one.weight_bytes),
              0.05e9 + c.vocab * c.hidden / 4);
  EXPECT_EQ(two.block_bytes, one.block_bytes);
  EXPECT_LT(two.kv_tokens, one.kv_tokens) << "a stage with a whole embedding or head has less room";
  EXPECT_GT(two.itl, one.itl) << "a token goes through the stages one after the other";
  EXPECT_EQ(two.cost.weights_us, DeriveStepCost(c, gpus.gpu, 4).weights_us);
  EXPECT_THAT(PlanCapacity(c, gpus, {}, {.stages = 3}).why_not,
              HasSubstr("8 GPUs cannot be shared out among 3 stages"));
  EXPECT_THAT(PlanCapacity(c, ParseGpus("128xH100").value(), {}, {.stages = 128}).why_not, HasSubstr("80 layers"));
  EXPECT_EQ(PlanCapacity(Published("405b"), ParseGpus("16xH100").value(), {}, {.stages = 2}).why_not, "");
}

TEST(Plan, WhatDoesNotFitSaysWhy) {
  const Capacity weights = Plan("405b", "8xH100");
  EXPECT_THAT(weights.why_not, HasSubstr("of weights"));
  EXPECT_EQ(weights.kv_tokens, 0);
  EXPECT_THAT(Plan("8b", "3xH100").why_not, HasSubstr("3 ranks"));
  EXPECT_THAT(Plan("8b", "H100", {.context = 200'000}).why_not, HasSubstr("131072 positions"));
  EXPECT_THAT(Plan("8b", "H100", {.context = 1024, .concurrency = 300}).why_not, HasSubstr("--max-num-seqs 256"));

  const Demand crowd = {.context = 32'768, .concurrency = 100};
  const Capacity kv = Plan("8b", "H100", crowd);
  EXPECT_THAT(kv.why_not, HasSubstr("KV cache"));
  // What it says would fit does, and no more than that.
  Demand less = crowd;
  less.concurrency = kv.largest_batch;
  EXPECT_EQ(Plan("8b", "H100", less).why_not, "");
  ++less.concurrency;
  EXPECT_NE(Plan("8b", "H100", less).why_not, "");
  less = crowd;
  less.context = kv.longest_context;
  EXPECT_EQ(Plan("8b", "H100", less).why_not, "");
  ++less.context;
  EXPECT_NE(Plan("8b", "H100", less).why_not, "");
}

TEST(Plan, NodesShareOutTheStages) {
  const GpuGroup node = ParseGpus("8xH100").value();
  const Capacity two = PlanCapacity(Published("405b"), node, {}, {.nodes = 2, .stages = 2});
  EXPECT_EQ(two.why_not, "");
  EXPECT_EQ(two.gpus, 16);
  const Capacity alone = PlanCapacity(Published("405b"), ParseGpus("16xH100").value(), {}, {.stages = 2});
  EXPECT_EQ(two.kv_tokens, alone.kv_tokens);
  EXPECT_EQ(two.itl, alone.itl);
  EXPECT_EQ(PlanCapacity(Published("405b"), node, {}, {.nodes = 2, .stages = 3}).why_not,
            "3 stages cannot be shared out among 2 nodes");
  // Which the program would refuse.
  EXPECT_EQ(PlanCapacity(Published("405b"), ParseGpus("16xH100").value(), {}, {}).why_not,
            "16 GPUs of a stage are more than the 8 that may be");
}

TEST(Plan, FewestMachines) {
  const Gpu h100 = ParseGpus("H100")->gpu, h200 = ParseGpus("H200")->gpu;
  const auto fewest = [](const char* model, const Gpu& gpu, const Demand& demand = {}) {
    const Machines machines = FewestMachines(Published(model), gpu, demand, {});
    return std::pair(machines.nodes, machines.gpus);
  };
  EXPECT_EQ(fewest("8b", h100), std::pair(1, 1));
  EXPECT_EQ(fewest("70b", h200), std::pair(1, 2));
  EXPECT_EQ(fewest("405b", h200), std::pair(1, 8));
  EXPECT_EQ(fewest("405b", h100), std::pair(2, 8));
  EXPECT_EQ(fewest("8b", h100, {.context = 131'072, .concurrency = 4096}), std::pair(1, 0));
}

TEST(Plan, TimesAddUp) {
  const Demand demand = {.context = 5000, .answer_tokens = 1000, .concurrency = 16};
  const Capacity plan = Plan("70b", "8xH200", demand);
  // 4,000 prompt tokens in steps of 2,048.
  const Duration first = StepTime(plan.cost, {.sequences = 1, .tokens = 2048, .prefill_context = 2048 * 2049 / 2});
  const Duration second =
      StepTime(plan.cost, {.sequences = 1, .tokens = 1952, .prefill_context = 4000 * 4001 / 2 - 2048 * 2049 / 2});
  EXPECT_EQ(plan.ttft, first + second);
  EXPECT_EQ(plan.itl, StepTime(plan.cost, {.sequences = 16, .tokens = 16, .decode_context = 16 * 4500}));
  EXPECT_NEAR(plan.tokens_per_second, 16 / Seconds(plan.itl), 1e-6);
}

}  // namespace
}  // namespace altiplano::bench

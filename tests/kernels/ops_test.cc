// The door: each op runs with arguments as ops.h has them, and dies of every single one that is not.
#include "kernels/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace altiplano {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kI32, DType::kI64};

std::vector<DType> F32And(DType act) {
  return act == DType::kF32 ? std::vector{act} : std::vector{DType::kF32, act};
}
const std::vector<DType> kActs = {DType::kF32, DType::kBF16};
const std::vector<DType> kIndex = {DType::kI32};

// One op and good arguments for it. Its tensors hold zeros, with room for elements of any dtype and rows that lie
// apart.
template <typename Args>
class Door {
 public:
  Door(std::string name, void (*op)(Stream&, const Args&)) : name_(std::move(name)), op_(op) {}

  TensorView Zeros(std::initializer_list<int64_t> shape, DType dtype) {
    TensorView view = TensorView::Make(nullptr, dtype, shape);
    memory_.push_back(std::make_unique<std::vector<int64_t>>(static_cast<size_t>(2 * view.elements()) + 16));
    view.data = memory_.back()->data();
    return view;
  }
  TensorView Ids(std::initializer_list<int32_t> ids) {
    const TensorView view = Zeros({static_cast<int64_t>(ids.size())}, DType::kI32);
    std::copy(ids.begin(), ids.end(), view.as<int32_t>());
    return view;
  }

  Args good = {};

  void Runs(const std::function<void(Args&)>& change = [](Args&) {}) {
    Args args = good;
    change(args);
    op_(*stream_, args);
  }
  // A step without tokens, or rows, needs no memory for them.
  void RunsOnNothing(const std::vector<TensorView Args::*>& empty) {
    Runs([&](Args& args) {
      for (auto member : empty) {
        (args.*member).shape[0] = 0;
        (args.*member).data = nullptr;
      }
    });
  }
  void Dies(const std::string& of, const std::function<void(Args&)>& change) {
    Args args = good;
    change(args);
    EXPECT_DEATH(op_(*stream_, args), name_ + ": broken argument: " + of);
  }

  // Everything that can be wrong with one tensor. `free`: its dimensions that no other tensor shares.
  void Checks(const char* name, TensorView Args::*member, const std::vector<DType>& dtypes,
              const std::vector<int>& free = {}) {
    SCOPED_TRACE(name_ + ", " + name);
    const TensorView& view = good.*member;
    const std::string itself = std::string(name) + " is ";
    const auto dies = [&](const std::string& of, const std::function<void(TensorView&)>& change) {
      Dies(of, [&](Args& args) { change(args.*member); });
    };
    for (DType dtype : kDTypes) {
      SCOPED_TRACE(Name(dtype));
      if (std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end()) {
        Runs([&](Args& args) { (args.*member).dtype = dtype; });
      } else {
        dies("", [&](TensorView& v) { v.dtype = dtype; });
      }
    }
    dies(itself + Name(view.dtype) + " on a GPU", [](TensorView& v) { v.device = Device::kCuda; });
    dies(itself, [](TensorView& v) { v.data = nullptr; });
    dies(itself, [](TensorView& v) { --v.rank; });
    if (view.rank < 4) {
      dies(itself, [](TensorView& v) { v.shape[static_cast<size_t>(v.rank++)] = 1; });
    }
    if (view.rank == 2) {
      Runs([&](Args& args) { (args.*member).stride0 += 3; });
      dies(itself, [](TensorView& v) { --v.stride0; });
    } else {
      dies(itself, [](TensorView& v) { ++v.stride0; });
    }
    for (int i = 0; i < view.rank; ++i) {
      SCOPED_TRACE(testing::Message() << "dimension " << i);
      const auto resize = [i](TensorView& v, int64_t by) {
        v.shape[static_cast<size_t>(i)] += by;
        int64_t inner = 1;
        for (int j = 1; j < v.rank; ++j) inner *= v.dim(j);
        v.stride0 = inner;
      };
      dies("", [&](TensorView& v) { resize(v, -1 - v.dim(i)); });
      if (std::find(free.begin(), free.end(), i) == free.end()) {
        dies("", [&](TensorView& v) { resize(v, 1); });
        dies("", [&](TensorView& v) { resize(v, -1); });
      }
    }
  }

 private:
  const std::string name_;
  void (*const op_)(Stream&, const Args&);
  const std::unique_ptr<Stream> stream_ = Stream::Cpu(1);
  std::vector<std::unique_ptr<std::vector<int64_t>>> memory_;
};

class OpsDeathTest : public testing::TestWithParam<DType> {
 protected:
  const DType act_ = GetParam();
  const std::vector<DType> f32_or_act_ = F32And(act_);
  // What the activations may become when another tensor stays as it is: f32 is taken wherever bf16 is.
  const std::vector<DType> act_or_lower_ = act_ == DType::kF32 ? kActs : std::vector{act_};
};

TEST_P(OpsDeathTest, Embed) {
  Door<EmbedArgs> door("Embed", Embed);
  door.good = {.out = door.Zeros({3, 8}, act_), .table = door.Zeros({5, 8}, act_), .ids = door.Ids({0, 4, 2})};
  door.Checks("out", &EmbedArgs::out, f32_or_act_);
  door.Checks("table", &EmbedArgs::table, act_or_lower_, {0});
  door.Checks("ids", &EmbedArgs::ids, kIndex);
  door.RunsOnNothing({&EmbedArgs::out, &EmbedArgs::ids});
}

TEST_P(OpsDeathTest, RmsNorm) {
  Door<RmsNormArgs> door("RmsNorm", RmsNorm);
  door.good = {.out = door.Zeros({3, 8}, act_), .x = door.Zeros({3, 8}, act_), .weight = door.Zeros({8}, act_)};
  door.Checks("out", &RmsNormArgs::out, kActs);
  door.Checks("x", &RmsNormArgs::x, kActs);
  door.Checks("weight", &RmsNormArgs::weight, kActs);
  door.RunsOnNothing({&RmsNormArgs::out, &RmsNormArgs::x});
}

TEST_P(OpsDeathTest, AddRmsNorm) {
  Door<AddRmsNormArgs> door("AddRmsNorm", AddRmsNorm);
  door.good = {.out = door.Zeros({3, 8}, act_),
               .residual = door.Zeros({3, 8}, act_),
               .x = door.Zeros({3, 8}, act_),
               .weight = door.Zeros({8}, act_)};
  door.Checks("out", &AddRmsNormArgs::out, kActs);
  door.Checks("residual", &AddRmsNormArgs::residual, kActs);
  door.Checks("x", &AddRmsNormArgs::x, kActs);
  door.Checks("weight", &AddRmsNormArgs::weight, kActs);
  door.RunsOnNothing({&AddRmsNormArgs::out, &AddRmsNormArgs::residual, &AddRmsNormArgs::x});
}

TEST_P(OpsDeathTest, Linear) {
  Door<LinearArgs> door("Linear", Linear);
  door.good = {.out = door.Zeros({3, 8}, act_), .x = door.Zeros({3, 8}, act_), .weight = door.Zeros({8, 8}, act_)};
  door.Checks("out", &LinearArgs::out, f32_or_act_);
  door.Checks("x", &LinearArgs::x, {act_});
  door.Checks("weight", &LinearArgs::weight, {act_});
  door.Dies("args.out.data != args.x.data", [](LinearArgs& args) { args.out.data = args.x.data; });
  door.Dies("IsAct", [](LinearArgs& args) { args.out.dtype = args.x.dtype = args.weight.dtype = DType::kI32; });
  door.Dies("k > 0", [](LinearArgs& args) { args.x.shape[1] = args.weight.shape[1] = 0; });
  door.RunsOnNothing({&LinearArgs::out, &LinearArgs::x});
}

TEST_P(OpsDeathTest, SiluMul) {
  Door<SiluMulArgs> door("SiluMul", SiluMul);
  door.good = {.out = door.Zeros({3, 8}, act_), .gate_up = door.Zeros({3, 16}, act_)};
  door.Checks("out", &SiluMulArgs::out, act_or_lower_);
  door.Checks("gate_up", &SiluMulArgs::gate_up, f32_or_act_);
  door.RunsOnNothing({&SiluMulArgs::out, &SiluMulArgs::gate_up});
}

TEST_P(OpsDeathTest, RopeStoreKv) {
  Door<RopeStoreKvArgs> door("RopeStoreKv", RopeStoreKv);
  door.good = {.q = door.Zeros({3, 4 * 8}, act_),
               .k = door.Zeros({3, 2 * 8}, act_),
               .v = door.Zeros({3, 2 * 8}, act_),
               .k_pages = door.Zeros({5, 2, 4, 8}, act_),
               .v_pages = door.Zeros({5, 2, 4, 8}, act_),
               .positions = door.Ids({0, 1, 2}),
               .slots = door.Ids({19, -1, 0}),
               .inv_freq = door.Zeros({4}, DType::kF32)};
  door.Checks("q", &RopeStoreKvArgs::q, f32_or_act_);
  door.Checks("k", &RopeStoreKvArgs::k, f32_or_act_);
  door.Checks("v", &RopeStoreKvArgs::v, f32_or_act_);
  door.Checks("k_pages", &RopeStoreKvArgs::k_pages, {act_});
  door.Checks("v_pages", &RopeStoreKvArgs::v_pages, {act_});
  door.Checks("positions", &RopeStoreKvArgs::positions, kIndex);
  door.Checks("slots", &RopeStoreKvArgs::slots, kIndex);
  door.Checks("inv_freq", &RopeStoreKvArgs::inv_freq, {DType::kF32});
  door.Dies("IsAct", [](RopeStoreKvArgs& args) {
    args.q.dtype = args.k.dtype = args.v.dtype = args.k_pages.dtype = args.v_pages.dtype = DType::kI32;
  });
  door.Dies("dim > 0 && dim % 2 == 0", [&](RopeStoreKvArgs& args) {
    args.q = door.Zeros({3, 28}, act_);
    args.k = args.v = door.Zeros({3, 14}, act_);
    args.k_pages = args.v_pages = door.Zeros({5, 2, 4, 7}, act_);
    args.inv_freq = door.Zeros({3}, DType::kF32);
  });
  door.RunsOnNothing({&RopeStoreKvArgs::q, &RopeStoreKvArgs::k, &RopeStoreKvArgs::v, &RopeStoreKvArgs::positions,
                      &RopeStoreKvArgs::slots});
}

TEST_P(OpsDeathTest, PagedAttention) {
  Door<PagedAttentionArgs> door("PagedAttention", PagedAttention);
  door.good = {.out = door.Zeros({3, 4 * 16}, act_),
               .q = door.Zeros({3, 4 * 16}, act_),
               .k_pages = door.Zeros({5, 2, 4, 16}, act_),
               .v_pages = door.Zeros({5, 2, 4, 16}, act_),
               .q_begin = door.Ids({0, 1, 3}),
               .context_lengths = door.Ids({5, 2}),
               .block_tables = door.Zeros({2, 2}, DType::kI32),
               .scale = 0.25f};
  door.Checks("out", &PagedAttentionArgs::out, {act_});
  door.Checks("q", &PagedAttentionArgs::q, f32_or_act_);
  door.Checks("k_pages", &PagedAttentionArgs::k_pages, {act_});
  door.Checks("v_pages", &PagedAttentionArgs::v_pages, {act_});
  door.Checks("q_begin", &PagedAttentionArgs::q_begin, kIndex);
  door.Checks("context_lengths", &PagedAttentionArgs::context_lengths, kIndex);
  door.Checks("block_tables", &PagedAttentionArgs::block_tables, kIndex, {1});
  door.Dies("IsAct", [](PagedAttentionArgs& args) {
    args.out.dtype = args.q.dtype = args.k_pages.dtype = args.v_pages.dtype = DType::kI32;
  });
  // Three query heads for two KV heads.
  door.Dies("width % ", [](PagedAttentionArgs& args) { args.out.shape[1] = args.q.shape[1] = 3 * 16; });
  door.Dies("kv_heads > 0 && dim > 0 && page_size > 0", [&](PagedAttentionArgs& args) {
    args.k_pages = args.v_pages = door.Zeros({5, 0, 4, 16}, act_);
  });
  door.Dies("kv_heads > 0 && dim > 0 && page_size > 0", [&](PagedAttentionArgs& args) {
    args.k_pages = args.v_pages = door.Zeros({5, 2, 0, 16}, act_);
  });
  door.Dies("kv_heads > 0 && dim > 0 && page_size > 0", [&](PagedAttentionArgs& args) {
    args.k_pages = args.v_pages = door.Zeros({5, 2, 4, 0}, act_);
  });
  door.RunsOnNothing({&PagedAttentionArgs::out, &PagedAttentionArgs::q});
}

INSTANTIATE_TEST_SUITE_P(DTypes, OpsDeathTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return Name(param.param); });

class GatherRowsDeathTest : public testing::TestWithParam<DType> {};

TEST_P(GatherRowsDeathTest, GatherRows) {
  Door<GatherRowsArgs> door("GatherRows", GatherRows);
  const DType dtype = GetParam();
  door.good = {.out = door.Zeros({3, 8}, dtype), .x = door.Zeros({5, 8}, dtype), .rows = door.Ids({4, 0, 4})};
  door.Checks("out", &GatherRowsArgs::out, {dtype});
  door.Checks("x", &GatherRowsArgs::x, {dtype}, {0});
  door.Checks("rows", &GatherRowsArgs::rows, kIndex);
  door.RunsOnNothing({&GatherRowsArgs::out, &GatherRowsArgs::rows});
}

INSTANTIATE_TEST_SUITE_P(DTypes, GatherRowsDeathTest, testing::ValuesIn(kDTypes),
                         [](const auto& param) { return Name(param.param); });

TEST(SamplingOpsDeathTest, Sample) {
  Door<SampleArgs> door("Sample", Sample);
  SampleResult results[3];
  const SampleParams params[3];
  std::vector<char> scratch(SampleScratchBytes(3, 8) + 1);
  door.good = {
      .results = results, .params = params, .logits = door.Zeros({3, 8}, DType::kF32), .scratch = scratch.data()};
  door.Checks("logits", &SampleArgs::logits, {DType::kF32}, {0, 1});
  door.Dies("vocab > 0", [](SampleArgs& args) { args.logits.shape[1] = 0; });
  door.Dies("rows == 0 ", [](SampleArgs& args) { args.results = nullptr; });
  door.Dies("rows == 0 ", [](SampleArgs& args) { args.params = nullptr; });
  door.good.results = nullptr;
  door.good.params = nullptr;
  door.RunsOnNothing({&SampleArgs::logits});
}

TEST(SamplingOpsDeathTest, Score) {
  Door<ScoreArgs> door("Score", Score);
  SampleResult results[3];
  for (SampleResult& result : results) result.token = 1;
  const int32_t num_top[3] = {};
  door.good = {.results = results, .num_top = num_top, .logits = door.Zeros({3, 8}, DType::kF32)};
  door.Checks("logits", &ScoreArgs::logits, {DType::kF32}, {0, 1});
  door.Dies("args.logits.dim", [](ScoreArgs& args) { args.logits.shape[1] = 0; });
  door.Dies("rows == 0 ", [](ScoreArgs& args) { args.results = nullptr; });
  door.Dies("rows == 0 ", [](ScoreArgs& args) { args.num_top = nullptr; });
  door.good.results = nullptr;
  door.good.num_top = nullptr;
  door.RunsOnNothing({&ScoreArgs::logits});
}

}  // namespace
}  // namespace altiplano

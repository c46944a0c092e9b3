// Every op in the shapes of Llama 3.1, as large as steps can be, on each architecture: no launch is beyond a limit.
// Nothing is computed, and there is no memory behind the tensors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/cuda/architectures.h"
#include "kernels/cuda/paged_attention_plan.h"
#include "kernels/cuda/rows_plan.h"
#include "kernels/ops.h"
#include "server/model/config.h"
#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"

namespace altiplano {
namespace {

constexpr int64_t kPageSize = 64, kPages = 50000, kMostSequences = 256;

class LaunchesTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    fake_cudart::Reset(fake_cudart::AllArchitectures());
    std::string error;
    stream_ = Stream::Cuda(gpu(), &error);
    ASSERT_NE(stream_, nullptr) << error;
    memory_ = Buffer::Allocate(*stream_, 1 << 20);
  }
  // The last refusal is told with the shape that it was in.
  void TearDown() override {
    EXPECT_THAT(fake_cudart::Refusals(), testing::IsEmpty());
    EXPECT_GT(fake_cudart::Count(gpu()).launches, 0);
    EXPECT_EQ(fake_cudart::Count(gpu()).asked_for_less, 0);
  }
  static int gpu() { return fake_cudart::FirstOf(GetParam()); }

  TensorView Make(std::initializer_list<int64_t> shape, DType dtype) const {
    return TensorView::Make(static_cast<char*>(memory_.data()) + made_++ % 64 * 256, dtype, shape, Device::kCuda);
  }
  TensorView Ints(std::initializer_list<int64_t> shape) const { return Make(shape, DType::kI32); }

  void Step(const ModelConfig& c, int64_t ranks, int64_t tokens, DType act) {
    SCOPED_TRACE(testing::Message() << c.hidden << " hidden, " << ranks << " ranks, " << tokens << " tokens, "
                                    << (act == DType::kBF16 ? "bf16" : "f32"));
    const int64_t hidden = c.hidden, dim = c.head_dim, ffn = c.ffn / ranks, vocab = (c.vocab + ranks - 1) / ranks;
    const int64_t q = c.q_heads / ranks * dim, kv_heads = std::max<int64_t>(1, c.kv_heads / ranks), kv = kv_heads * dim;
    const int64_t rows = std::min(tokens, kMostSequences);
    const auto f32 = [&](std::initializer_list<int64_t> shape) { return Make(shape, DType::kF32); };
    Stream& stream = *stream_;
    Embed(stream, {.out = f32({tokens, hidden}), .table = Make({vocab, hidden}, act), .ids = Ints({tokens})});
    RmsNorm(stream, {.out = Make({tokens, hidden}, act), .x = f32({tokens, hidden}), .weight = f32({hidden})});
    AddRmsNorm(stream, {.out = Make({tokens, hidden}, act),
                        .residual = f32({tokens, hidden}),
                        .x = f32({tokens, hidden}),
                        .weight = f32({hidden})});
    const auto linear = [&](int64_t t, int64_t n, int64_t k, DType out, bool accumulate) {
      Linear(stream, {.out = Make({t, n}, out),
                      .x = Make({t, k}, act),
                      .weight = Make({n, k}, act),
                      .accumulate = accumulate,
                      .scratch = memory_.data()});
    };
    linear(tokens, q + 2 * kv, hidden, act, false);
    linear(tokens, hidden, q, DType::kF32, true);
    linear(tokens, hidden, ffn, DType::kF32, false);
    linear(rows, vocab, hidden, DType::kF32, false);
    LinearSiluMul(stream, {.out = Make({tokens, ffn}, act),
                           .x = Make({tokens, hidden}, act),
                           .weight = Make({2 * ffn, hidden}, act),
                           .gate_up = Make({tokens, 2 * ffn}, act),
                           .scratch = memory_.data()});
    SiluMul(stream, {.out = Make({tokens, ffn}, act), .gate_up = Make({tokens, 2 * ffn}, act)});
    const TensorView qkv = Make({tokens, q + 2 * kv}, act), pool = Make({kPages, kv_heads, kPageSize, dim}, act);
    RopeStoreKv(stream, {.q = qkv.columns(0, q),
                         .k = qkv.columns(q, kv),
                         .v = qkv.columns(q + kv, kv),
                         .k_pages = pool,
                         .v_pages = pool,
                         .positions = Ints({tokens}),
                         .slots = Ints({tokens}),
                         .inv_freq = f32({dim / 2})});
    // One long prompt; all that decode; both.
    Attend(c, ranks, tokens, {tokens}, act);
    if (tokens <= kMostSequences) Attend(c, ranks, tokens, std::vector<int64_t>(static_cast<size_t>(tokens), 1), act);
    if (tokens > kMostSequences) {
      std::vector<int64_t> mixed(kMostSequences, 1);
      mixed.back() = tokens - kMostSequences + 1;
      Attend(c, ranks, tokens, mixed, act);
    }
    GatherRows(stream, {.out = f32({rows, hidden}), .x = f32({tokens, hidden}), .rows = Ints({rows})});
    std::vector<SampleResult> results(static_cast<size_t>(rows));
    std::vector<SampleParams> params(static_cast<size_t>(rows));
    for (size_t i = 0; i < params.size(); ++i) {
      params[i] = {.top_k = 40, .top_p = 0.9f, .repetition_penalty = 1.1f, .top_logprobs = 20};
      params[i].output_counts = params[i].counts_out = static_cast<uint16_t*>(memory_.data());
      params[i].in_prompt = static_cast<const uint8_t*>(memory_.data());
    }
    Sample(stream, {.results = results.data(),
                    .params = params.data(),
                    .logits = f32({rows, c.vocab}),
                    .scratch = memory_.data()});
    ASSERT_EQ(stream.Error(), "");
  }

  void Attend(const ModelConfig& c, int64_t ranks, int64_t tokens, const std::vector<int64_t>& queries, DType act) {
    const int64_t context = c.max_position, sequences = static_cast<int64_t>(queries.size());
    const cuda::GpuProperties& properties = cuda::PropertiesOf(*stream_);
    const cuda::AttentionSizes sizes = {
        .q_heads = c.q_heads / ranks,
        .kv_heads = std::max<int64_t>(1, c.kv_heads / ranks),
        .dim = c.head_dim,
        .may_prefill = cuda::TakesPrefill(*properties.architecture, act, c.head_dim, kPageSize),
        .scratch_bytes = size_t{64} << 20,
        .multiprocessors = properties.multiprocessors};
    std::vector<int32_t> q_begin = {0}, lengths;
    for (const int64_t n : queries) {
      q_begin.push_back(q_begin.back() + static_cast<int32_t>(n));
      lengths.push_back(static_cast<int32_t>(std::max(n, context)));
    }
    std::vector<int32_t> list(static_cast<size_t>(cuda::AttentionListWords(sizes, tokens, sequences)));
    AttentionWork work = cuda::PlanAttention(sizes, q_begin.data(), lengths.data(), sequences, tokens, list.data());
    work.list = Ints({work.list.elements()});
    const int64_t width = sizes.q_heads * sizes.dim;
    const TensorView pool = Make({kPages, sizes.kv_heads, kPageSize, sizes.dim}, act);
    PagedAttention(*stream_, {.out = Make({tokens, width}, act),
                              .q = Make({tokens, width}, act),
                              .k_pages = pool,
                              .v_pages = pool,
                              .q_begin = Ints({sequences + 1}),
                              .context_lengths = Ints({sequences}),
                              .block_tables = Ints({sequences, context / kPageSize + 1}),
                              .scale = 1,
                              .work = work,
                              .scratch = memory_.data(),
                              .scratch_bytes = sizes.scratch_bytes});
  }

  std::unique_ptr<Stream> stream_;
  Buffer memory_;
  mutable size_t made_ = 0;  // tensors, each at another place than those before it
};

TEST_P(LaunchesTest, AreWithinTheLimits) {
  for (const char* model : {"8b", "70b", "405b"}) {
    const ModelConfig config = PublishedModelConfig(model).value();
    for (const int64_t ranks : {1, 2, 8}) {
      for (const int64_t tokens : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256, 512, 2048, 8192, 32768, 131072}) {
        for (const DType act : {DType::kBF16, DType::kF32}) {
          Step(config, ranks, tokens, act);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
  EXPECT_EQ(fake_cudart::Count(gpu()).tensor_maps > 0, GetParam() >= 90);
}

// Rows of any width up to the widest: what they need of shared memory is on both sides of what need not be asked for.
TEST_P(LaunchesTest, OfNormsAreWithinTheLimitsForEveryWidth) {
  std::string error;
  const auto group = MakeCudaGroup({.ordinals = {gpu() + 1, gpu()}}, &error);
  ASSERT_EQ(error, "");
  stream_->UseFromThisThread();
  for (int64_t hidden = 64; hidden <= cuda::kWidestNorm; hidden += 32) {
    SCOPED_TRACE(testing::Message() << hidden << " columns");
    const TensorView x = Make({3, hidden}, DType::kF32), weight = Make({hidden}, DType::kF32);
    RmsNorm(*stream_, {.out = Make({3, hidden}, DType::kBF16), .x = x, .weight = weight});
    AddRmsNorm(
        *stream_,
        {.out = Make({3, hidden}, DType::kBF16), .residual = Make({3, hidden}, DType::kF32), .x = x, .weight = weight});
    EXPECT_TRUE(group[1]->AllReduceAddRmsNorm(*stream_, {.out = Make({3, hidden}, DType::kBF16),
                                                         .residual = Make({3, hidden}, DType::kF32),
                                                         .x = x,
                                                         .weight = weight,
                                                         .eps = 1e-5f}));
    ASSERT_EQ(stream_->Error(), "");
  }
}

TEST_P(LaunchesTest, BetweenRanksAreWithinTheLimits) {
  std::string error;
  const auto group = MakeCudaGroup({.ordinals = {gpu() + 1, gpu(), gpu() + 2}}, &error);
  ASSERT_EQ(error, "");
  stream_->UseFromThisThread();
  for (const int64_t hidden : {4096, 8192, 16384}) {
    for (const int64_t tokens : {1, 16, 128, 512, 8192}) {
      const TensorView x = Make({tokens, hidden}, DType::kF32), weight = Make({hidden}, DType::kF32);
      EXPECT_TRUE(group[1]->AllReduceSum(*stream_, x));
      EXPECT_TRUE(group[1]->AllReduceAddRmsNorm(
          *stream_,
          {.out = Make({tokens, hidden}, DType::kBF16), .residual = x, .x = x, .weight = weight, .eps = 1e-5f}));
    }
  }
  EXPECT_TRUE(group[1]->AllGather(*stream_, Make({256, 3 * 42752}, DType::kF32), Make({256, 42752}, DType::kF32)));
  EXPECT_TRUE(group[1]->Broadcast(*stream_, Ints({256})));
  EXPECT_EQ(stream_->Error(), "");
}

INSTANTIATE_TEST_SUITE_P(Architectures, LaunchesTest, testing::Values(80, 89, 90),
                         [](const auto& test) { return "Sm" + std::to_string(test.param); });

}  // namespace
}  // namespace altiplano

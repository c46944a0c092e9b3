// Ops recorded and launched again: what they read anew, what stays as it was recorded, and what may not be recorded.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/kernels/cuda/cuda_testlib.h"

namespace altiplano {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class CudaStepGraph : public CudaTest {
 protected:
  // The place of a row in the values that follow each other, by way of gathering it.
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    values_ = std::make_unique<OnDevice>(stream(), std::vector<int32_t>{10, 11, 12, 13});
    rows_ = std::make_unique<OnDevice>(stream(), std::vector<int32_t>{3, 0});
    out_ = std::make_unique<OnDevice>(stream(), std::vector<int32_t>{0, 0});
    ASSERT_EQ(stream().Synchronize(), "");
  }
  static TensorView Column(const OnDevice& vector) {
    const TensorView view = vector.view();
    return TensorView::Make(view.data, view.dtype, {view.dim(0), 1}, view.device);
  }
  void Gather(int64_t rows) {
    GatherRows(stream(), {.out = Column(*out_).first(rows), .x = Column(*values_), .rows = rows_->view().first(rows)});
  }
  void Write(const OnDevice& to, const std::vector<int32_t>& values) {
    Copy(stream(), to.view().data, Device::kCuda, values.data(), Device::kCpu, values.size() * sizeof(int32_t));
    ASSERT_EQ(stream().Synchronize(), "");
  }
  // The error of a capture that does something besides.
  std::string ErrorOf(const std::function<void()>& what) {
    std::string error;
    const auto graph = StepGraph::Capture(
        stream(), [&] { return Gather(2), what(), true; }, &error);
    EXPECT_EQ(graph, nullptr);
    return error;
  }

  std::unique_ptr<OnDevice> values_, rows_, out_;
};

TEST_F(CudaStepGraph, ReadsMemoryAnewAndArgumentsAsTheyWere) {
  Gather(2);
  std::string error;
  int64_t rows = 1;
  const auto graph = StepGraph::Capture(
      stream(), [&] { return Gather(rows), true; }, &error);
  ASSERT_NE(graph, nullptr) << error;
  EXPECT_EQ(graph->ops(), 1u);
  Write(*out_, {0, 0});
  EXPECT_THAT(out_->Values(), ElementsAre(0, 0)) << "capturing ran it";
  rows = 2;  // the graph does not learn of it
  graph->Launch(stream());
  EXPECT_THAT(out_->Values(), ElementsAre(13, 0));
  Write(*rows_, {2, 1});
  Write(*values_, {20, 21, 22, 23});
  graph->Launch(stream());
  EXPECT_THAT(out_->Values(), ElementsAre(22, 0));
}

TEST_F(CudaStepGraph, AnIssueThatGivesUpLeavesTheStreamAsItWas) {
  std::string error = "before";
  EXPECT_EQ(StepGraph::Capture(
                stream(), [&] { return Gather(2), false; }, &error),
            nullptr);
  EXPECT_EQ(error, "");
  Gather(2);
  EXPECT_THAT(out_->Values(), ElementsAre(13, 10));
}

#ifndef ALTIPLANO_ON_GPU
TEST_F(CudaStepGraph, RefusesWhatCannotBeCaptured) {
  const auto event = StreamEvent::Create(stream());
  std::vector<int32_t> pageable(2);
  Buffer pinned = Buffer::AllocateHost(stream(), 8);
  const auto fetch_to = [&](void* to) { Copy(stream(), to, Device::kCpu, out_->view().data, Device::kCuda, 8); };
  EXPECT_EQ(ErrorOf([&] { stream().Synchronize(); }), "a wait for the stream while a stream is captured");
  EXPECT_THAT(ErrorOf([&] { stream().Error(); }), HasSubstr("a look at the stream"));
  EXPECT_THAT(ErrorOf([&] { event->Record(stream()); }), HasSubstr("an event that the host waits for"));
  EXPECT_THAT(ErrorOf([&] { event->Wait(); }), HasSubstr("a wait for an event"));
  EXPECT_THAT(ErrorOf([&] { event->Passed(); }), HasSubstr("a look at an event"));
  EXPECT_THAT(ErrorOf([&] { Buffer::Allocate(stream(), 4); }), HasSubstr("an allocation"));
  EXPECT_THAT(ErrorOf([&] { Buffer::AllocateHost(stream(), 4); }), HasSubstr("an allocation"));
  EXPECT_THAT(ErrorOf([&] { Buffer gone = std::move(pinned); }), HasSubstr("a release of memory"));
  EXPECT_THAT(ErrorOf([&] { fetch_to(pageable.data()); }), HasSubstr("a copy of host memory that is not pinned"));

  pinned = Buffer::AllocateHost(stream(), 8);
  std::string error;
  const auto graph = StepGraph::Capture(
      stream(), [&] { return Gather(2), fetch_to(pinned.data()), true; }, &error);
  ASSERT_NE(graph, nullptr) << error;
  EXPECT_EQ(graph->ops(), 2u);
  graph->Launch(stream());
  EXPECT_EQ(stream().Synchronize(), "");
  EXPECT_EQ(static_cast<int32_t*>(pinned.data())[0], 13);
  EXPECT_THAT(ErrorOf([&] { graph->Launch(stream()); }), HasSubstr("a launch of a graph"));
}
#endif

}  // namespace
}  // namespace altiplano

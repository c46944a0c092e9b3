// ForwardingCommunicator: a rank's place in a group, with calls passed on to the member that it owns. Of those who do
// something before, after or instead of some calls, and for that override only these.
//
// AllReduceAddRmsNorm is Communicator's own: the derived class's AllReduceSum, then the norm. most_captured_bytes is
// its 0 and CheckSame its nothing, too: what a derived class does beside a call would be in no graph.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/comm/communicator.h"

namespace altiplano {

class ForwardingCommunicator : public Communicator {
 public:
  explicit ForwardingCommunicator(std::unique_ptr<Communicator> member) : member_(std::move(member)) {}

  int rank() const override { return member_->rank(); }
  int size() const override { return member_->size(); }
  bool AllReduceSum(Stream& stream, const TensorView& x) override { return member_->AllReduceSum(stream, x); }
  bool AllocateSummed(const Stream& stream, size_t bytes, void** memory) override {
    return member_->AllocateSummed(stream, bytes, memory);
  }
  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    return member_->AllGather(stream, out, x);
  }
  bool Broadcast(Stream& stream, const TensorView& x) override { return member_->Broadcast(stream, x); }
  void Abort(std::string_view reason) override { member_->Abort(reason); }
  std::string error() const override { return member_->error(); }

 protected:
  Communicator& member() { return *member_; }
  const Communicator& member() const { return *member_; }

 private:
  const std::unique_ptr<Communicator> member_;
};

}  // namespace altiplano

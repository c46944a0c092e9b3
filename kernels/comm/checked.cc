// Compares what calls leave behind, by hashes that all ranks gather on the CPU.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/comm/forwarding.h"

namespace altiplano {

namespace {

uint64_t HashBytes(uint64_t hash, const char* data, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, std::min<size_t>(8, bytes - at));
    hash = (hash ^ word) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return hash;
}

// "0", "0 and 2", "0, 1 and 2"
std::string List(const std::vector<int>& ranks) {
  std::string out;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) out += i + 1 < ranks.size() ? ", " : " and ";
    out += std::to_string(ranks[i]);
  }
  return out;
}

// Which ranks hold another hash than most do; where there is no most, who holds what.
std::string Sentence(std::string_view what, const std::vector<uint64_t>& hashes) {
  std::map<uint64_t, std::vector<int>> holders;
  for (size_t rank = 0; rank < hashes.size(); ++rank) holders[hashes[rank]].push_back(static_cast<int>(rank));
  const auto most = std::max_element(holders.begin(), holders.end(),
                                     [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  if (2 * most->second.size() <= hashes.size()) {
    std::string out = "ranks differ in " + std::string(what) + ":";
    for (const auto& [hash, ranks] : holders) out += " " + List(ranks) + (hash == holders.rbegin()->first ? "" : ";");
    return out;
  }
  std::vector<int> others;
  for (size_t rank = 0; rank < hashes.size(); ++rank) {
    if (hashes[rank] != most->first) others.push_back(static_cast<int>(rank));
  }
  return (others.size() == 1 ? "rank " + List(others) + " differs" : "ranks " + List(others) + " differ") +
         " from the others in " + std::string(what);
}

class Checked : public ForwardingCommunicator {
 public:
  explicit Checked(std::unique_ptr<Communicator> member)
      : ForwardingCommunicator(std::move(member)), cpu_(Stream::Cpu(1)) {}

  bool AllReduceSum(Stream& stream, const TensorView& x) override {
    ++calls_;
    return member().AllReduceSum(stream, x) && CheckTensor("the sum", stream, x);
  }
  bool AllReduceAddRmsNorm(Stream& stream, const AddRmsNormArgs& args) override {
    ++calls_;
    return member().AllReduceAddRmsNorm(stream, args) && CheckTensor("the residual stream", stream, args.residual) &&
           CheckTensor("the norm", stream, args.out);
  }
  bool AllGather(Stream& stream, const TensorView& out, const TensorView& x) override {
    ++calls_;
    return member().AllGather(stream, out, x);
  }
  bool Broadcast(Stream& stream, const TensorView& x) override {
    ++calls_;
    return member().Broadcast(stream, x) && CheckTensor("what was broadcast", stream, x);
  }

  bool CheckSame(std::string_view what, uint64_t hash) override {
    std::vector<uint64_t> hashes(static_cast<size_t>(size()));
    const TensorView all = TensorView::Make(hashes.data(), DType::kI64, {1, size()});
    if (!member().AllGather(*cpu_, all, TensorView::Make(&hash, DType::kI64, {1, 1}))) return false;
    if (std::all_of(hashes.begin(), hashes.end(), [&](uint64_t other) { return other == hash; })) return true;
    Abort(Sentence(what, hashes));
    return false;
  }

 private:
  // Of a matrix or something dense.
  bool CheckTensor(const char* what, Stream& stream, const TensorView& x) {
    const size_t element = SizeOf(x.dtype);
    const int64_t rows = x.rank == 2 ? x.dim(0) : 1;
    const size_t row_bytes = static_cast<size_t>(x.rank == 2 ? x.dim(1) : x.elements()) * element;
    uint64_t hash = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = static_cast<const char*>(x.data) + static_cast<size_t>(i * x.stride0) * element;
      if (x.device == Device::kCuda) {
        row_.resize(row_bytes);
        Copy(stream, row_.data(), Device::kCpu, row, Device::kCuda, row_bytes);
        if (std::string error = stream.Synchronize(); !error.empty()) {
          Abort("rank " + std::to_string(rank()) + ": " + error);
          return false;
        }
        row = row_.data();
      }
      hash = HashBytes(hash, row, row_bytes);
    }
    return CheckSame(std::string(what) + " of call " + std::to_string(calls_), hash);
  }

  const std::unique_ptr<Stream> cpu_;
  // The rank's thread's.
  uint64_t calls_ = 0;
  std::vector<char> row_;
};

}  // namespace

std::unique_ptr<Communicator> MakeChecked(std::unique_ptr<Communicator> member) {
  return std::make_unique<Checked>(std::move(member));
}

}  // namespace altiplano

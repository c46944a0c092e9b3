// Times every op on a GPU, in the shapes of Llama 3.1, and the memory bandwidth that they are held against.
//
//   gpu_bench --json FILE [--part NAME,...] [--skip N] [--dry | --rehearse]
//   gpu_bench --check
//
// FILE gets a JSON line for each case: its sizes, the bytes and products that it must at least move and compute, and
// microseconds. A case that fails is the last: a kernel's fault stays with the process. --skip N goes on behind the
// first N cases, whose lines are in FILE. FILE.running has the line of the case that is being measured, for whoever
// ends one that hangs. --check: whether every GPU does what it is told, exit code 69 where one does not. --dry writes
// the same lines without times and needs no GPU. --rehearse measures the small cases alone, of those that need little
// memory, with fewer bytes and few calls: what the simulator can do. run_gpu.py makes a table of them.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/comm/all_reduce_plan.h"
#include "kernels/ops.h"
#include "server/base/json.h"
#include "server/base/split.h"
#include "server/base/strings.h"
#include "tests/gpu/gpu_cases.h"
#include "tests/gpu/gpu_timer.h"
#include "tests/gpu/rank_cases.h"
#ifdef ALTIPLANO_IN_SIMULATOR
#include "kernels/cuda/sim/sim.h"
#endif

namespace altiplano::gpu {
namespace {

// Copy and read bandwidth are cases like others; both count the bytes that memory sees.
std::vector<Case> LimitCases() {
  constexpr size_t kCopyBytes = size_t{1} << 30, kReadBytes = size_t{2} << 30;
  Case copy, read;
  copy.part = read.part = "limits";
  copy.name = "copy of 1 GiB";
  copy.bytes = 2.0 * kCopyBytes;
  copy.prepare = [](Arena& arena) {
    return [&arena](Stream& stream, int turn) {
      Copy(stream, arena.Output(turn, 1, kCopyBytes / 4, DType::kF32).data, Device::kCuda,
           arena.Input(turn, 1, kCopyBytes / 4, DType::kF32).data, Device::kCuda, kCopyBytes);
    };
  };
  read.name = "read of 2 GiB";
  read.bytes = kReadBytes;
  read.prepare = [](Arena& arena) {
    return [&arena](Stream& stream, int turn) {
      ReadMemory(stream, arena.Input(turn, 1, kReadBytes / 4, DType::kF32).data, kReadBytes);
    };
  };
  return {copy, read};
}

std::vector<Case> Cases() {
  std::vector<Case> cases = LimitCases();
  for (std::vector<Case> more : {AllCases(), AllReduceCases(CountGpus())}) {
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  }
  return cases;
}

int Usage() {
  std::fputs(
      "usage: gpu_bench --json FILE [--part NAME,...] [--skip N] [--dry | --rehearse]\n       gpu_bench "
      "--check\nparts:",
      stderr);
  std::string last;
  for (const Case& c : Cases()) {
    if (c.part != last) std::fprintf(stderr, " %s", c.part.c_str());
    last = c.part;
  }
  std::fputs("\n", stderr);
  return 64;
}

// Empty, or which GPU this is and what is wrong with it: a kernel swaps two rows.
std::string CheckGpu(int ordinal) {
  constexpr int64_t kWidth = 1024;
  std::string error;
  const std::unique_ptr<Stream> stream = Stream::Cuda(ordinal, &error);
  if (stream == nullptr) return error;
  const std::string gpu = StrCat("GPU ", ordinal, ": ");
  std::vector<float> sent(2 * kWidth), got(2 * kWidth);
  for (size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<float>(i);
  const std::vector<int32_t> order = {1, 0};
  const size_t bytes = sent.size() * sizeof(float), order_bytes = order.size() * sizeof(int32_t);
  const Buffer from = Buffer::Allocate(*stream, bytes), to = Buffer::Allocate(*stream, bytes),
               rows = Buffer::Allocate(*stream, order_bytes);
  if (!from || !to || !rows) return gpu + "it has no memory left";
  Copy(*stream, from.data(), Device::kCuda, sent.data(), Device::kCpu, bytes);
  Copy(*stream, rows.data(), Device::kCuda, order.data(), Device::kCpu, order_bytes);
  GatherRows(*stream, {.out = TensorView::Make(to.data(), DType::kF32, {2, kWidth}, Device::kCuda),
                       .x = TensorView::Make(from.data(), DType::kF32, {2, kWidth}, Device::kCuda),
                       .rows = TensorView::Make(rows.data(), DType::kI32, {2}, Device::kCuda)});
  Copy(*stream, got.data(), Device::kCpu, to.data(), Device::kCuda, bytes);
  if (error = stream->Synchronize(); !error.empty()) return gpu + error;
  std::rotate(got.begin(), got.begin() + kWidth, got.end());
  return got == sent ? "" : gpu + "a kernel computed something else than it should";
}

int Check() {
  for (int ordinal = 0; ordinal < std::max(1, CountGpus()); ++ordinal) {
    if (const std::string error = CheckGpu(ordinal); !error.empty()) {
      std::fprintf(stderr, "gpu_bench: %s\n", error.c_str());
      return 69;
    }
  }
  std::puts("every GPU answers");
  return 0;
}

// A rehearsal's.
constexpr Effort kLittleEffort = {.runs = 2, .run_seconds = 0, .most_calls = 3, .small = true};
constexpr int64_t kSmallMessage = 16 << 10;

int Main(int argc, char** argv) {
  std::string path, part;
  bool dry = false, rehearse = false;
  size_t skipped = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--check" && argc == 2) {
      return Check();
    } else if (word == "--dry") {
      dry = true;
    } else if (word == "--rehearse") {
      rehearse = true;
    } else if (word == "--skip" && i + 1 < argc) {
      skipped = std::strtoul(argv[++i], nullptr, 10);
    } else if ((word == "--json" || word == "--part") && i + 1 < argc) {
      (word == "--json" ? path : part) = argv[++i];
    } else {
      return Usage();
    }
  }
  if (path.empty() || (dry && rehearse)) return Usage();
  std::vector<Case> cases = Cases();
  if (rehearse) {
    std::erase_if(cases, [](const Case& c) { return c.measure == nullptr || c.sizes.at("message") > kSmallMessage; });
  }
  if (!part.empty()) {
    const std::vector<std::string_view> parts = Split(part, ',');
    std::erase_if(cases, [&](const Case& c) { return std::find(parts.begin(), parts.end(), c.part) == parts.end(); });
  }
  if (cases.empty()) return Usage();
  cases.erase(cases.begin(), cases.begin() + static_cast<std::ptrdiff_t>(std::min(skipped, cases.size())));

  std::ofstream file(path, skipped > 0 ? std::ios::app : std::ios::trunc);
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Arena> arena;
  if (!dry) {
    std::string error;
    stream = Stream::Cuda(0, &error);
    if (stream == nullptr) {
      std::fprintf(stderr, "gpu_bench: %s\n", error.c_str());
      return 69;
    }
    if (std::any_of(cases.begin(), cases.end(), [](const Case& c) { return c.measure == nullptr; })) {
      arena = std::make_unique<Arena>(*stream);
    }
    if (arena != nullptr && !*arena) {
      std::fprintf(stderr, "gpu_bench: the GPU has no %s left\n",
                   HumanBytes(Arena::kInputBytes + Arena::kOutputBytes).c_str());
      return 69;
    }
    std::printf("%s\n", Describe(*stream).c_str());
  }
  const std::string running = path + ".running";
  int failed = 0;
  for (const Case& c : cases) {
    OrderedJson line = {{"part", c.part}, {"name", c.name}, {"bytes", c.bytes}, {"flops", c.flops}};
    for (const auto& [size, value] : c.sizes) line[size] = value;
    if (!dry) {
      std::ofstream(running) << line.dump() << "\n";
      const Time time = c.measure != nullptr ? c.measure(rehearse ? kLittleEffort : Effort())
                                             : Measure(*stream, c.captured, c.prepare(*arena));
      if (!time.error.empty()) {
        line["error"] = time.error;
        std::printf("%-60s %s\n", c.name.c_str(), time.error.c_str());
        ++failed;
      } else {
        line["us"] = time.median * 1e6;
        line["least_us"] = time.least * 1e6;
        line["calls"] = time.calls;
        std::printf("%-60s %10.2f us %8.1f GB/s %8.1f TFLOP/s\n", c.name.c_str(), time.median * 1e6,
                    c.bytes / time.median * 1e-9, c.flops / time.median * 1e-12);
      }
      std::fflush(stdout);
    }
    file << line.dump() << "\n" << std::flush;  // what was measured stays when the next case hangs
    if (failed > 0) break;
  }
  if (!dry) std::remove(running.c_str());
  if (!file) std::fprintf(stderr, "gpu_bench: %s cannot be written\n", path.c_str());
  return failed > 0 || !file ? 1 : 0;
}

}  // namespace
}  // namespace altiplano::gpu

int main(int argc, char** argv) {
#ifdef ALTIPLANO_IN_SIMULATOR
  altiplano::sim::SetGpus(altiplano::kMostPeers);
#endif
  return altiplano::gpu::Main(argc, argv);
}

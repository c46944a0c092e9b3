// What this machine can do at most: reading and copying memory, multiplying and adding. Everything else is held against
// these.
#include <cstdio>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/thread_team.h"
#include "tests/bench/limits.h"

int main(int argc, char** argv) {
  using namespace altiplano;
  using namespace altiplano::bench;
  Report report("limits", argc, argv);
  const std::unique_ptr<Stream> stream = Stream::Cpu();
  Limits limits(*stream);
  report.Section("limits of " + Describe(*stream));
  if (DetectedIsa() == Isa::kAmxBf16)
    report.Note("AMX is not among the multiply loops: bf16 may exceed its limit here.");

  const std::vector<Timing> timings = Interleave(
      {[&] { limits.Read(); }, [&] { limits.Copy(); }, [&] { limits.MultiplyBf16(); }, [&] { limits.MultiplyF32(); }},
      300, 0.0005);
  auto add = [&](const char* name, const Timing& timing, double work, const char* unit, const char* kernel) {
    Result result;
    result.name = name;
    result.value = work / timing.best() / 1e9;
    result.unit = unit;
    result.remark = std::string(kernel) + ", median round " + Number(work / timing.median() / 1e9);
    result.extra = {{"kernel", kernel}, {"median", work / timing.median() / 1e9}};
    result.trusted = timing.trusted();
    report.Add(result);
  };
  add("read bandwidth", timings[0], Limits::kReadBytes, "GB/s", limits.read_name());
  add("copy bandwidth (bytes read and written)", timings[1], 2 * Limits::kCopyBytes, "GB/s", limits.copy_name());
  add("GEMM peak, bf16", timings[2], limits.multiply_flops(true), "GFLOP/s", limits.multiply_name(true));
  add("GEMM peak, f32", timings[3], limits.multiply_flops(false), "GFLOP/s", limits.multiply_name(false));
}

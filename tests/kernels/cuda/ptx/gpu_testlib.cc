// Makes the stand-in for the CUDA runtime run what it is given: programs that are linked with it have eight GPUs, as
// far as they can tell. ALTIPLANO_PTX_GPU is their compute capability, 80, 89 or 90 (the default); ALTIPLANO_PTX_SEED
// decides what is left to chance; files in the folder ALTIPLANO_PTX_INSTEAD are read instead of those of the build by
// their names.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "tests/kernels/cuda/ptx/machine_testlib.h"
#include "tests/kernels/cuda/ptx/program_testlib.h"
#include "tests/kernels/cuda/runtime/fake_cudart_testlib.h"

namespace altiplano {
namespace {

using ptx_machine::Kernel;

int FromEnvironment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

// What the target kernels_ptx_`architecture` has made.
std::map<std::string, Kernel> ReadFiles(const std::string& architecture) {
  std::map<std::string, Kernel> all;
  const std::string folder = ALTIPLANO_BINARY_DIR "/tests/CMakeFiles/kernels_ptx_" + architecture + ".dir";
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.path().extension() != ".ptx") continue;
    std::filesystem::path path = entry.path();
    if (const char* instead = std::getenv("ALTIPLANO_PTX_INSTEAD")) {
      const std::filesystem::path other = instead / path.filename();
      if (std::filesystem::exists(other)) path = other;
    }
    std::ifstream file(path);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<std::string> errors;
    all.merge(ptx_machine::ReadPtx(path.string(), text, &errors));
    for (const std::string& error : errors) std::fprintf(stderr, "%s\n", error.c_str());
    if (!errors.empty()) std::abort();
  }
  return all;
}

const Kernel& Find(const std::string& name, int capability) {
  static const auto* of_80 = new std::map(ReadFiles("80"));  // runs on 89 too
  static const auto* of_90 = new std::map(ReadFiles("90a"));
  const auto& all = capability >= 90 ? *of_90 : *of_80;
  const auto found = all.find(ptx_machine::WithoutHashes(name));
  if (found == all.end()) {
    std::fprintf(stderr, "no PTX of %s\n", name.c_str());
    std::abort();
  }
  return found->second;
}

std::vector<std::byte> LayOut(const std::string& name, int capability, void** each) {
  const Kernel& kernel = Find(name, capability);
  std::vector<std::byte> parameters(kernel.parameter_bytes);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    std::memcpy(parameters.data() + kernel.parameter_begin[i], each[i], kernel.parameters[i]);
  }
  return parameters;
}

std::string Run(const fake_cudart::KernelLaunch& launch) {
  static const auto seed = static_cast<uint64_t>(FromEnvironment("ALTIPLANO_PTX_SEED", 1));
  static std::atomic<uint64_t> launches = 0;
  ptx_machine::Launch made = launch.launch;
  made.seed = seed * 1'000'003 + launches++;
  return ptx_machine::Run(Find(launch.kernel, launch.capability), made);
}

// Before main, whichever the program is.
[[maybe_unused]] const bool installed = [] {
  fake_cudart::RunKernelsBy(LayOut, Run);
  fake_cudart::Reset(
      {.capabilities = std::vector<int>(8, FromEnvironment("ALTIPLANO_PTX_GPU", 90)), .bytes = size_t{8} << 30});
  return true;
}();

}  // namespace
}  // namespace altiplano

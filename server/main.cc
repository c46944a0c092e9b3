#include <exception>
#include <string_view>
#include <vector>

#include "server/base/crash.h"
#include "server/cli/command.h"

int main(int argc, char** argv) {
  using namespace altiplano::cli;
  const altiplano::crash::SignalStack signal_stack;
  std::vector<std::string_view> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  try {
    return Main(arguments);
  } catch (const std::exception& error) {  // nothing of ours throws; a library might
    return Fail("", error.what(), kExitBug);
  }
}

#include <fcntl.h>

#include <cerrno>
#include <exception>
#include <new>
#include <string_view>
#include <system_error>
#include <vector>

#include "server/base/crash.h"
#include "server/base/strings.h"
#include "server/cli/command.h"

namespace {

// One that is closed would be given to whatever is opened next, be it a client's connection, and what is printed or
// logged would go there. Opened the wrong way round, so that using it fails as if it were closed.
void TakeClosedStandardFiles() {
  for (const int fd : {0, 1, 2}) {
    if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
  }
}

}  // namespace

int main(int argc, char** argv) {
  using namespace altiplano::cli;
  TakeClosedStandardFiles();
  const altiplano::crash::SignalStack signal_stack;
  std::vector<std::string_view> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  const std::string_view command = arguments.empty() ? "" : arguments.front();
  // Nothing of ours throws; a library might, and threads do that are not to be had.
  try {
    return Main(arguments);
  } catch (const std::bad_alloc&) {
    return Fail(command, "no memory is left", kExitUnavailable);
  } catch (const std::system_error& error) {
    return Fail(command,
                altiplano::StrCat("the system refuses a thread or something else: ", error.what(),
                                  "; ulimit -a and the container show what limits there are"),
                kExitUnavailable);
  } catch (const std::exception& error) {
    return Fail(command, error.what(), kExitBug);
  }
}

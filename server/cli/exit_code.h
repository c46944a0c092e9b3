// What the program's exit code says (sysexits.h numbers; docs: altiplano help).
#pragma once

#include "server/base/status.h"

namespace altiplano::cli {

enum ExitCode : int {
  kExitOk = 0,             // done; a server: drained
  kExitFailure = 1,        // a request was refused or failed; not serving (health)
  kExitUsage = 64,         // unknown command, flag or field; a value that is not allowed, or not with this model
  kExitData = 65,          // the model's files
  kExitUnavailable = 69,   // no usable device, not enough memory, no server at the address, address taken
  kExitBug = 70,           // a broken invariant of ours
  kExitRestart = 75,       // a device or a rank failed while serving, or the start hung: start the program again
  kExitInterrupted = 130,  // SIGINT or SIGTERM ended a load test before its end
};

// Of an error while opening or loading a model. INVALID_ARGUMENT is of its files, OUT_OF_RANGE of a setting.
inline ExitCode ExitCodeOfLoad(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
    case Code::kCancelled:
      return kExitOk;
    case Code::kOutOfRange:
      return kExitUsage;
    case Code::kResourceExhausted:
    case Code::kUnavailable:
      return kExitUnavailable;
    case Code::kInternal:
      return kExitBug;
    case Code::kDeadlineExceeded:  // of a node whose start hangs
      return kExitRestart;
    default:
      return kExitData;
  }
}

}  // namespace altiplano::cli

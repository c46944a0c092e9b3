# Writes OUT, which defines altiplano::cli::kCommit: GIVEN, or what git says of SOURCE, or "unknown". Run at every build, so that
# a program never names another commit than its own; the file is left alone when nothing changed.
set(commit "${GIVEN}")
if(commit STREQUAL "")
  execute_process(COMMAND git -C ${SOURCE} describe --always --dirty --abbrev=12 --exclude=*
    OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed OR commit STREQUAL "")
    set(commit "unknown")
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT [[
#include "server/cli/version.h"

namespace altiplano::cli {
const char* const kCommit = "@commit@";
}
]] @ONLY)

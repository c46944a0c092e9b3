// Any bytes as a config file: an error with a place, or a config that prints and reads back as the same.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "server/base/check.h"
#include "server/cli/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano::cli;
  auto file = ParseConfig(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz");
  if (!file.ok()) {
    CHECK(file.status().message().starts_with("fuzz:"));
    CHECK(file.status().message().find('\n') == std::string::npos);
    return 0;
  }
  auto flags = ParsedFlags::Parse(Command{.name = "fuzz"}, {});
  auto config = ResolveConfig(*flags, &*file);
  if (!config.ok()) return 0;
  auto again = ParseConfig(PrintConfig(*config), "again");
  CHECK(again.ok());
  CHECK(again->values.SerializeAsString() == config->values.SerializeAsString());
  return 0;
}

// Values with units, as flags and config files write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/clock.h"
#include "server/base/status.h"

namespace altiplano::cli {

// "16GiB", "1.5 GB", "4096" (bytes). KiB, MiB, GiB, TiB are powers of 1024; kB, KB, MB, GB, TB of 1000.
StatusOr<uint64_t> ParseBytes(std::string_view text);

// "30s", "1.5m", "250ms", "2h"; "0". Any other number without a unit is an error. At most 1000 days.
StatusOr<Duration> ParseDuration(std::string_view text);

// Of a config, whose texts were checked when it was made.
uint64_t CheckedBytes(std::string_view text);
Duration CheckedDuration(std::string_view text);
inline std::chrono::milliseconds CheckedMilliseconds(std::string_view text) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(CheckedDuration(text));
}

// A decimal integer within [min, max], underscores and commas not allowed.
StatusOr<int64_t> ParseCount(std::string_view text, int64_t min, int64_t max);

// A decimal integer of 64 bits, no sign: what a server may have drawn.
StatusOr<uint64_t> ParseSeed(std::string_view text);

// Words with commas between them, "blue,green"; an empty text has none. Where a comma has no word before or behind it,
// that is an error.
StatusOr<std::vector<std::string>> ParseWords(std::string_view text);

// Such a list of what ParseCount reads, "1,8,32".
StatusOr<std::vector<int64_t>> ParseCounts(std::string_view text, int64_t min, int64_t max);

StatusOr<double> ParseReal(std::string_view text);

StatusOr<bool> ParseBool(std::string_view text);  // true, false, yes, no, on, off, 1, 0

// A server's, without grpc:// or http:// before it and slashes behind it.
std::string_view AddressOfUrl(std::string_view url);

// "127.0.0.1:50051", "[::1]:0", "localhost:80", "unix:/run/altiplano.sock".
Status CheckAddress(std::string_view text);

// Such an address, perhaps with what AddressOfUrl takes away.
Status CheckUrl(std::string_view text);

// In double quotes and on one line: quotes, backslashes and control bytes escaped as textproto reads them.
std::string Quote(std::string_view text);

}  // namespace altiplano::cli

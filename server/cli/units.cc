#include "server/cli/units.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "server/base/split.h"
#include "server/base/strings.h"

namespace altiplano::cli {

namespace {

// Splits "1.5 GB" into 1.5 and "GB". Only plain decimals: no sign, exponent, hex or "inf".
bool SplitNumber(std::string_view text, double* number, std::string_view* unit) {
  size_t end = text.find_first_not_of("0123456789.");
  if (end == std::string_view::npos) end = text.size();
  std::string_view digits = text.substr(0, end);
  if (digits.empty() || digits.front() == '.' || digits.back() == '.') return false;
  auto [rest, error] = std::from_chars(digits.data(), digits.data() + digits.size(), *number, std::chars_format::fixed);
  if (error != std::errc() || rest != digits.data() + digits.size()) return false;
  *unit = text.substr(end);
  while (!unit->empty() && unit->front() == ' ') unit->remove_prefix(1);
  return true;
}

struct Unit {
  std::string_view name;
  double factor;
};

constexpr std::array kByteUnits = {
    Unit{"", 1},
    Unit{"B", 1},
    Unit{"KiB", 1024.0},
    Unit{"MiB", 1048576.0},
    Unit{"GiB", 1073741824.0},
    Unit{"TiB", 1099511627776.0},
    Unit{"kB", 1e3},
    Unit{"KB", 1e3},
    Unit{"MB", 1e6},
    Unit{"GB", 1e9},
    Unit{"TB", 1e12},
};
constexpr std::array kTimeUnits = {
    Unit{"ns", 1}, Unit{"us", 1e3}, Unit{"ms", 1e6}, Unit{"s", 1e9}, Unit{"m", 60e9}, Unit{"h", 3600e9},
};

}  // namespace

StatusOr<uint64_t> ParseBytes(std::string_view text) {
  double number = 0;
  std::string_view unit;
  if (!SplitNumber(text, &number, &unit)) return InvalidArgument("must be a size such as 16GiB, 512MB or 4096 (bytes)");
  for (const Unit& known : kByteUnits) {
    if (known.name != unit) continue;
    double bytes = number * known.factor;
    if (bytes > 9e18) return InvalidArgument("is more than 2^63 bytes");
    if (bytes != std::floor(bytes)) return InvalidArgument("is not a whole number of bytes");
    return static_cast<uint64_t>(bytes);
  }
  return InvalidArgument(
      StrCat("has the unit ", Quote(unit), ", must be one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB"));
}

StatusOr<Duration> ParseDuration(std::string_view text) {
  double number = 0;
  std::string_view unit;
  if (!SplitNumber(text, &number, &unit)) return InvalidArgument("must be a duration such as 30s, 250ms or 1.5m");
  if (unit.empty()) {
    if (number == 0) return Duration::zero();
    return InvalidArgument(StrCat("has no unit: write ", text, "s for seconds, ", text, "ms for milliseconds"));
  }
  for (const Unit& known : kTimeUnits) {
    if (known.name != unit) continue;
    double nanoseconds = number * known.factor;
    if (nanoseconds > 1000.0 * 86400e9) return InvalidArgument("is more than 1000 days");
    return Duration(static_cast<Duration::rep>(std::llround(nanoseconds)));
  }
  return InvalidArgument(StrCat("has the unit ", Quote(unit), ", must be one of ns, us, ms, s, m, h"));
}

uint64_t CheckedBytes(std::string_view text) {
  return ParseBytes(text).value();
}
Duration CheckedDuration(std::string_view text) {
  return ParseDuration(text).value();
}

StatusOr<int64_t> ParseCount(std::string_view text, int64_t min, int64_t max) {
  int64_t value = 0;
  auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  bool whole = error == std::errc() && rest == text.data() + text.size() && !text.empty();
  if (whole && value >= min && value <= max) return value;
  if (max == std::numeric_limits<int64_t>::max())
    return InvalidArgument(StrCat("must be a whole number of at least ", min));
  return InvalidArgument(StrCat("must be a whole number from ", min, " to ", max));
}

StatusOr<uint64_t> ParseSeed(std::string_view text) {
  uint64_t value = 0;
  auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && rest == text.data() + text.size()) return value;
  return InvalidArgument(StrCat("must be a whole number from 0 to ", std::numeric_limits<uint64_t>::max()));
}

StatusOr<std::vector<std::string>> ParseWords(std::string_view text) {
  const std::vector<std::string_view> words = Split(text, ',');
  if (std::ranges::count(words, "") > 0) {
    return InvalidArgument(StrCat(Quote(text), " has an empty element: write commas between values only"));
  }
  return std::vector<std::string>(words.begin(), words.end());
}

StatusOr<std::vector<int64_t>> ParseCounts(std::string_view text, int64_t min, int64_t max) {
  ASSIGN_OR_RETURN(const std::vector<std::string> words, ParseWords(text));
  std::vector<int64_t> counts;
  for (const std::string& word : words) {
    const auto count = ParseCount(word, min, max);
    if (!count.ok()) return InvalidArgument(StrCat(Quote(word), " ", count.status().message()));
    counts.push_back(*count);
  }
  return counts;
}

StatusOr<double> ParseReal(std::string_view text) {
  double value = 0;
  auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || rest != text.data() + text.size() || !std::isfinite(value)) {
    return InvalidArgument("must be a number such as 0.7");
  }
  return value;
}

StatusOr<bool> ParseBool(std::string_view text) {
  for (std::string_view yes : {"true", "yes", "on", "1"}) {
    if (text == yes) return true;
  }
  for (std::string_view no : {"false", "no", "off", "0"}) {
    if (text == no) return false;
  }
  return InvalidArgument("must be true or false");
}

std::string_view AddressOfUrl(std::string_view url) {
  for (std::string_view scheme : {"grpc://", "http://"}) {
    if (url.starts_with(scheme)) url.remove_prefix(scheme.size());
  }
  while (url.ends_with('/') && !url.starts_with("unix:")) url.remove_suffix(1);
  return url;
}

Status CheckAddress(std::string_view text) {
  if (text.starts_with("unix:")) {
    if (text.size() > 5 + 107) return InvalidArgument("is a unix socket path of more than 107 bytes");
    return text.size() > 5 ? OkStatus() : InvalidArgument("must name a socket, as unix:/run/altiplano.sock");
  }
  size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0)
    return InvalidArgument("must be HOST:PORT such as 127.0.0.1:50051");
  std::string_view host = text.substr(0, colon);
  bool bracketed = host.front() == '[' && host.back() == ']';
  if (host.find(':') != std::string_view::npos && !bracketed) {
    const bool ipv6 = host.find_first_not_of("0123456789abcdefABCDEF:.") == std::string_view::npos;
    return InvalidArgument(ipv6 ? "must have its IPv6 address in brackets, as [::1]:50051"
                                : "must be HOST:PORT such as 127.0.0.1:50051, or unix:/path");
  }
  if (auto port = ParseCount(text.substr(colon + 1), 0, 65535); !port.ok()) {
    return InvalidArgument("must end with a port from 0 to 65535 (0: any free one)");
  }
  return OkStatus();
}

Status CheckUrl(std::string_view text) {
  const std::string_view address = AddressOfUrl(text);
  // With "dns:", "ipv4:" and "ipv6:" gRPC's own names of resolvers, which no address begins with.
  for (std::string_view scheme : {"://", "dns:", "ipv4:", "ipv6:"}) {
    if (scheme == "://" ? address.find(scheme) == std::string_view::npos : !address.starts_with(scheme)) continue;
    return InvalidArgument(
        "must be HOST:PORT or unix:/path, with nothing, grpc:// or http:// before it (there is no TLS)");
  }
  return CheckAddress(address);
}

std::string Quote(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += StrCat('\\', c);
    } else if (byte < 0x20 || byte == 0x7F) {
      out += StrFormat("\\%03o", byte);
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace altiplano::cli

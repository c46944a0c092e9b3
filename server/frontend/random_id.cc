#include "server/frontend/random_id.h"

#include <sys/random.h>

#include "server/base/check.h"
#include "server/base/strings.h"

namespace altiplano {

uint64_t RandomU64() {
  uint64_t value = 0;
  // Up to 256 bytes are never cut short once the kernel's pool is seeded.
  CHECK(getrandom(&value, sizeof value, 0) == static_cast<ssize_t>(sizeof value));
  return value;
}

std::string RandomUuid() {
  uint64_t high = (RandomU64() & ~uint64_t{0xF000}) | 0x4000;
  uint64_t low = (RandomU64() & (~uint64_t{0} >> 2)) | (uint64_t{1} << 63);
  return StrFormat("%08x-%04x-%04x-%04x-%012llx", static_cast<unsigned>(high >> 32),
                   static_cast<unsigned>(high >> 16 & 0xFFFF), static_cast<unsigned>(high & 0xFFFF),
                   static_cast<unsigned>(low >> 48), static_cast<unsigned long long>(low & 0xFFFFFFFFFFFF));
}

}  // namespace altiplano

// Tenants: who shares the server, with what share, and within which limits of its own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/status.h"

namespace altiplano {

struct TenantOptions {
  std::string name;                 // as in Request::tenant; kOtherTenants: all that are not listed, together
  int32_t weight = 1;               // its part of the service, against the others' weights
  int32_t max_running = 0;          // sequences at one time; 0: no limit of its own
  int32_t max_queued_requests = 0;  // 0: the same
  int64_t max_queued_tokens = 0;    // 0: the same

  bool operator==(const TenantOptions&) const = default;
};

inline constexpr std::string_view kOtherTenants = "*";
inline constexpr int32_t kMostWeight = 1000;

// "gold:weight=4,max-running=64;free:weight=1,max-queued=20,max-queued-tokens=100000;*:weight=1". Empty: no tenants.
StatusOr<std::vector<TenantOptions>> ParseTenants(std::string_view text);

// Ends with kOtherTenants from now on. INVALID_ARGUMENT when the list contradicts itself or `max_running`, the
// sequences that run at one time.
StatusOr<std::vector<TenantOptions>> CompleteTenants(std::vector<TenantOptions> tenants, int32_t max_running);

// Its place in a complete list.
size_t TenantOf(const std::vector<TenantOptions>& tenants, std::string_view name);

}  // namespace altiplano

#include "server/scheduler/tenants.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "server/base/split.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr size_t kMostTenants = 256;

// Cuts off what is before the next `separator`.
std::string_view Next(std::string_view* text, char separator) {
  const size_t end = std::min(text->find(separator), text->size());
  const std::string_view part = text->substr(0, end);
  text->remove_prefix(std::min(end + 1, text->size()));
  return part;
}

Status ParseOne(std::string_view text, TenantOptions* tenant) {
  const bool has_settings = text.find(':') != std::string_view::npos;
  tenant->name = Next(&text, ':');
  if (tenant->name.empty()) return InvalidArgument("a tenant has no name; write NAME:weight=N");
  if (has_settings && text.empty())
    return InvalidArgument(StrCat("tenant ", tenant->name, ": nothing follows the colon"));
  for (std::string_view value : Split(text, ',')) {
    if (value.empty()) return InvalidArgument(StrCat("tenant ", tenant->name, ": there is a comma too many"));
    const std::string_view name = Next(&value, '=');
    int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < 1) {
      return InvalidArgument(
          StrCat("tenant ", tenant->name, ": ", name, " is \"", value, "\", must be a whole number from 1"));
    }
    const auto small = static_cast<int32_t>(std::min<int64_t>(number, INT32_MAX));
    if (name == "weight") {
      tenant->weight = small;
    } else if (name == "max-running") {
      tenant->max_running = small;
    } else if (name == "max-queued") {
      tenant->max_queued_requests = small;
    } else if (name == "max-queued-tokens") {
      tenant->max_queued_tokens = number;
    } else {
      return InvalidArgument(StrCat("tenant ", tenant->name, " has no setting \"", name,
                                    "\"; there are weight, max-running, max-queued and max-queued-tokens"));
    }
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::vector<TenantOptions>> ParseTenants(std::string_view text) {
  std::vector<TenantOptions> tenants;
  if (text.empty()) return tenants;
  for (std::string_view one : Split(text, ';')) {
    if (one.empty()) return InvalidArgument("there is a semicolon too many");
    RETURN_IF_ERROR(ParseOne(one, &tenants.emplace_back()));
  }
  return tenants;
}

StatusOr<std::vector<TenantOptions>> CompleteTenants(std::vector<TenantOptions> tenants, int32_t max_running) {
  std::set<std::string_view> names;
  for (const TenantOptions& tenant : tenants) {
    if (!names.insert(tenant.name).second) return InvalidArgument(StrCat("tenant ", tenant.name, " is listed twice"));
    if (tenant.name.empty() || !std::ranges::all_of(tenant.name, [](char c) { return c >= '!' && c <= '~'; })) {
      return InvalidArgument(StrCat("tenant \"", tenant.name, "\": no request can name it; use visible ASCII"));
    }
    if (tenant.weight < 1 || tenant.weight > kMostWeight) {
      return InvalidArgument(StrCat("tenant ", tenant.name, ": weight is ", tenant.weight, ", must be from 1 to ",
                                    kMostWeight, "; only the weights' ratios matter"));
    }
    if (tenant.max_running < 0 || tenant.max_running > max_running) {
      return InvalidArgument(StrCat("tenant ", tenant.name, ": max-running is ", tenant.max_running, ", but only ",
                                    max_running, " sequences run at one time; lower it or raise --max-num-seqs"));
    }
    if (tenant.max_queued_requests < 0 || tenant.max_queued_tokens < 0) {
      return InvalidArgument(StrCat("tenant ", tenant.name, ": max-queued and max-queued-tokens must not be negative"));
    }
  }
  auto others = std::ranges::find(tenants, kOtherTenants, &TenantOptions::name);
  if (others == tenants.end()) {
    tenants.emplace_back().name = kOtherTenants;
  } else {
    std::rotate(others, others + 1, tenants.end());
  }
  if (tenants.size() > kMostTenants) {
    return InvalidArgument(StrCat(tenants.size(), " tenants are listed, at most ", kMostTenants, " are possible"));
  }
  return tenants;
}

size_t TenantOf(const std::vector<TenantOptions>& tenants, std::string_view name) {
  const auto it = std::ranges::find(tenants, name, &TenantOptions::name);
  return it == tenants.end() ? tenants.size() - 1 : static_cast<size_t>(it - tenants.begin());
}

}  // namespace altiplano

// FairShare: what service accounts have had for their weights, and who is to be served next.
//
// An account's level is its service divided by its weight. Whoever is lowest is next, so that accounts that always have
// something to do rise together: their services are as their weights. An account that comes back from idleness starts
// level with the lowest that is busy: what it left unused is not owed to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace altiplano {

class FairShare {
 public:
  explicit FairShare(std::span<const int32_t> weights);  // each at least 1

  // The account has something to do from now on, and no more from now on.
  void Join(size_t account);
  void Leave(size_t account);
  void Charge(size_t account, int64_t service) { accounts_[account].pending += service; }

  // All accounts, lowest first; among equals the one with the lower index. Valid until the next call.
  std::span<const size_t> Order();
  int64_t Level(size_t account);  // in 1/1024 of service for a weight of 1

  // For checkpoints: what there is beside weights and who is busy.
  struct Service {
    int64_t level = 0;
    int64_t pending = 0;    // service charged since level was worked out
    int64_t remainder = 0;  // of that division

    bool operator==(const Service&) const = default;
  };
  const Service& service(size_t account) const { return accounts_[account]; }
  int64_t floor() const { return floor_; }
  void Restore(size_t account, const Service& service, bool busy);
  void RestoreFloor(int64_t floor) { floor_ = floor; }

 private:
  struct Account : Service {
    int64_t weight = 1;
    bool busy = false;
  };
  void Settle(Account* account);
  void RaiseFloor();

  std::vector<Account> accounts_;
  std::vector<size_t> order_;
  int64_t floor_ = 0;  // the lowest level of the accounts that were busy when somebody last joined or left
};

}  // namespace altiplano

#include "server/scheduler/fair_share.h"

#include <algorithm>

namespace altiplano {

namespace {
constexpr int64_t kParts = 1024;
}

FairShare::FairShare(std::span<const int32_t> weights) {
  for (int32_t weight : weights) {
    order_.push_back(accounts_.size());
    accounts_.emplace_back().weight = weight;
  }
}

void FairShare::Settle(Account* account) {
  if (account->pending == 0) return;
  const int64_t parts = account->pending * kParts + account->remainder;
  account->level += parts / account->weight;
  account->remainder = parts % account->weight;
  account->pending = 0;
}

// With nobody busy, nobody has waited for what the highest had: all debts are settled.
void FairShare::RaiseFloor() {
  int64_t lowest = INT64_MAX, highest = 0;
  for (Account& account : accounts_) {
    Settle(&account);
    highest = std::max(highest, account.level);
    if (account.busy) lowest = std::min(lowest, account.level);
  }
  floor_ = std::max(floor_, lowest == INT64_MAX ? highest : lowest);
}

void FairShare::Join(size_t index) {
  RaiseFloor();
  Account& account = accounts_[index];
  account.busy = true;
  account.level = std::max(account.level, floor_);
}

void FairShare::Leave(size_t index) {
  RaiseFloor();
  accounts_[index].busy = false;
}

void FairShare::Restore(size_t account, const Service& service, bool busy) {
  static_cast<Service&>(accounts_[account]) = service;
  accounts_[account].busy = busy;
}

std::span<const size_t> FairShare::Order() {
  for (Account& account : accounts_) Settle(&account);
  // Nearly in order already.
  for (size_t i = 1; i < order_.size(); ++i) {
    auto higher = [&](size_t a, size_t b) {
      return accounts_[a].level != accounts_[b].level ? accounts_[a].level > accounts_[b].level : a > b;
    };
    for (size_t j = i; j > 0 && higher(order_[j - 1], order_[j]); --j) std::swap(order_[j - 1], order_[j]);
  }
  return order_;
}

int64_t FairShare::Level(size_t account) {
  Settle(&accounts_[account]);
  return accounts_[account].level;
}

}  // namespace altiplano

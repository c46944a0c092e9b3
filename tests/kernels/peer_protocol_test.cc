// The protocol of kernels/cuda/all_reduce.cu, explored in every order that memory allows: two or three ranks, three
// calls behind each other. A rank's program is a partial order of steps: what neither a barrier of the block, a
// release, an acquire nor the end of a kernel orders happens in any order. Reading what another call laid out, or
// waiting for ever, is found; and so is every way to weaken the protocol that is tried here.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "kernels/comm/all_reduce_plan.h"

namespace altiplano {
namespace {

constexpr int kRanks = 3, kBlocks = 2, kCalls = 3;

// How a protocol may be weakened.
struct Protocol {
  bool releases = true;        // flags are stored with a release
  bool acquires = true;        // and polled with an acquire
  bool two_halves = true;      // calls take halves of the mailbox in turn
  bool waits_for_last = true;  // for the flag of the last rank too
  bool signals_last = true;    // and it is told
  bool meets_again = true;     // two shots: before the sums are read
  uint32_t behind = 0;         // flags of so many calls ago will do
};

enum class Action : uint8_t { kLayOut, kSum, kSignal, kWait, kRead };

// Of one rank. Memory is the rank's or the `other`'s.
struct Step {
  Action action;
  Mail mail;    // laid out, summed or read; a meeting: the first before messages are read, the second before sums
  int block;    // who does it
  int section;  // of the mailbox: what a block of a launch with all blocks works on
  int other;
  int call;        // 1 ...
  uint64_t after;  // steps that come first
};

using Program = std::vector<Step>;

// What rank `self` of `ranks` does: calls of one or two shots, each with its number of blocks.
struct Call {
  int shots, blocks;
};

class ProgramOf {
 public:
  ProgramOf(int self, int ranks, const std::vector<Call>& calls, const Protocol& protocol)
      : self_(self), ranks_(ranks), protocol_(protocol) {
    for (size_t i = 0; i < calls.size(); ++i) {
      call_ = static_cast<int>(i) + 1;
      const uint64_t kernel = All();  // the kernel before has ended
      for (int block = 0; block < calls[i].blocks; ++block) {
        block_ = block;
        first_section_ = block;
        end_section_ = calls[i].blocks == 1 ? kBlocks : block + 1;
        Block(calls[i].shots, kernel);
      }
    }
  }
  Program steps;

 private:
  uint64_t All() const { return (uint64_t{1} << steps.size()) - 1; }
  uint64_t Add(Action action, Mail mail, int section, int other, uint64_t after) {
    steps.push_back({action, mail, block_, section, other, call_, after});
    return uint64_t{1} << (steps.size() - 1);
  }
  // The steps of the block that must have happened before whatever follows: a poll that acquires holds all back.
  void Block(int shots, uint64_t kernel) {
    uint64_t stored = 0;
    for (int section = first_section_; section < end_section_; ++section) {
      stored |= Add(Action::kLayOut, Mail::kMessage, section, self_, kernel);
    }
    uint64_t met = Meet(Mail::kMessage, kernel, stored);
    uint64_t read = Read(Mail::kMessage, met, kernel);
    if (shots == 1) return;
    stored = 0;
    for (int section = first_section_; section < end_section_; ++section) {
      stored |= Add(Action::kSum, Mail::kSums, section, self_, met | read);  // needs what was read
    }
    if (protocol_.meets_again) met = Meet(Mail::kSums, met, met | read | stored);
    Read(Mail::kSums, met, kernel);
  }
  uint64_t Meet(Mail mail, uint64_t before, uint64_t released) {
    for (int other = 0; other < ranks_; ++other) {
      const bool told = other != ranks_ - 1 || protocol_.signals_last;
      if (other != self_ && told) {
        Add(Action::kSignal, mail, 0, other, protocol_.releases ? before | released : before);
      }
    }
    // Flags only grow, so that the order of the waits does not matter.
    uint64_t met = before;
    for (int other = 0; other < ranks_; ++other) {
      const bool waits = other != ranks_ - 1 || protocol_.waits_for_last;
      if (other != self_ && waits) met |= Add(Action::kWait, mail, 0, other, met);
    }
    return met;
  }
  // One after the other: whatever is read late in any order is read late in this one too.
  uint64_t Read(Mail mail, uint64_t met, uint64_t kernel) {
    uint64_t read = protocol_.acquires ? met : kernel;
    uint64_t own = 0;
    for (int other = 0; other < ranks_; ++other) {
      for (int section = first_section_; other != self_ && section < end_section_; ++section) {
        const uint64_t step = Add(Action::kRead, mail, section, other, read);
        read |= step;
        own |= step;
      }
    }
    return own;
  }

  const int self_, ranks_;
  const Protocol protocol_;
  int call_ = 0, block_ = 0, first_section_ = 0, end_section_ = 0;
};

struct State {
  std::array<uint64_t, kRanks> done{};  // steps
  // By the call that stored last.
  uint8_t mail[kRanks][2][2][kBlocks] = {};        // [rank][half][message, sums][section]
  uint8_t flags[kRanks][2][kBlocks][kRanks] = {};  // [rank][meeting][block][from]
  bool operator==(const State&) const = default;
};
struct HashState {
  size_t operator()(const State& state) const {
    uint64_t hash = 0;
    for (uint64_t done : state.done) hash = (hash ^ done) * 0x9E3779B97F4A7C15, hash ^= hash >> 29;
    // Memory is nearly a function of the steps done; what it adds is told apart by ==.
    return hash;
  }
};

// Empty, or the first thing that goes wrong in some order.
class Explorer {
 public:
  Explorer(int ranks, const std::vector<Call>& calls, const Protocol& protocol) : protocol_(protocol) {
    for (int rank = 0; rank < ranks; ++rank) {
      programs_.push_back(ProgramOf(rank, ranks, calls, protocol).steps);
      EXPECT_LE(programs_.back().size(), 64u);
    }
  }
  std::string Explore() {
    std::vector<State> open = {State()};
    seen_.insert(open.back());
    while (!open.empty()) {
      const State state = open.back();
      open.pop_back();
      bool ended = true, moved = false;
      for (size_t rank = 0; rank < programs_.size(); ++rank) {
        const Program& program = programs_[rank];
        for (size_t i = 0; i < program.size(); ++i) {
          if (state.done[rank] >> i & 1) continue;
          ended = false;
          if ((program[i].after & ~state.done[rank]) != 0) continue;
          State next = state;
          std::string wrong;
          if (!Take(rank, program[i], &next, &wrong)) continue;
          if (!wrong.empty()) return wrong;
          moved = true;
          next.done[rank] |= uint64_t{1} << i;
          if (seen_.insert(next).second) open.push_back(next);
        }
      }
      if (!ended && !moved) return "all wait for ever";
    }
    return "";
  }
  size_t states() const { return seen_.size(); }

 private:
  uint32_t Half(int call) const { return protocol_.two_halves ? HalfOfCall(static_cast<uint32_t>(call)) : 0; }

  // False: the step cannot be taken yet.
  bool Take(size_t rank, const Step& step, State* state, std::string* wrong) const {
    const auto kind = static_cast<size_t>(step.mail), block = static_cast<size_t>(step.block);
    const auto section = static_cast<size_t>(step.section), other = static_cast<size_t>(step.other);
    const auto call = static_cast<uint8_t>(step.call);
    switch (step.action) {
      case Action::kLayOut:
      case Action::kSum:
        state->mail[rank][Half(step.call)][kind][section] = call;
        return true;
      case Action::kSignal:
        state->flags[other][kind][block][rank] = std::max(state->flags[other][kind][block][rank], call);
        return true;
      case Action::kWait:
        return state->flags[rank][kind][block][other] + protocol_.behind >= call;
      case Action::kRead:
        if (const int found = state->mail[other][Half(step.call)][kind][section]; found != step.call) {
          *wrong = "rank " + std::to_string(rank) + " reads call " + std::to_string(found) + " of rank " +
                   std::to_string(other) + " in call " + std::to_string(step.call);
        }
        return true;
    }
    return true;
  }

  const Protocol protocol_;
  std::vector<Program> programs_;
  std::unordered_set<State, HashState> seen_;
};

constexpr Call kOne = {1, 1}, kTwo = {2, 1}, kOneOfTwoBlocks = {1, 2}, kTwoOfTwoBlocks = {2, 2};

std::string WrongWith(int ranks, const std::vector<Call>& calls, const Protocol& protocol) {
  return Explorer(ranks, calls, protocol).Explore();
}

TEST(PeerProtocol, IsRightInEveryOrder) {
  struct Case {
    int ranks;
    std::vector<Call> calls;
    size_t least_states;
  };
  const Case cases[] = {
      {2, {kOne, kOne, kOne}, 100},
      {2, {kTwo, kTwo, kTwo}, 100},
      {2, {kOne, kTwo, kOne}, 100},
      {2, {kTwo, kOne, kTwo}, 100},
      // Blocks of one launch that cover what another number of blocks covered in the launches before.
      {2, {kOneOfTwoBlocks, kOne, kOneOfTwoBlocks}, 500},
      {2, {kOne, kOneOfTwoBlocks, kOne}, 500},
      {2, {kOneOfTwoBlocks, kOneOfTwoBlocks, kOneOfTwoBlocks}, 500},
      {2, {kOne, kTwoOfTwoBlocks, kOne}, 1000},
      {3, {kOne, kOne, kOne}, 1000},
      {3, {kOne, kTwo, kOne}, 1000},
      {3, {kTwo, kTwo, kOne}, 1000},
  };
  for (const Case& c : cases) {
    Explorer explorer(c.ranks, c.calls, {});
    EXPECT_EQ(explorer.Explore(), "") << c.ranks << " ranks";
    EXPECT_GT(explorer.states(), c.least_states);
    RecordProperty("states", std::to_string(explorer.states()));
  }
}

TEST(PeerProtocol, EveryWeakeningIsFound) {
  for (int ranks : {2, 3}) {
    SCOPED_TRACE(ranks);
    for (const std::vector<Call>& calls : {std::vector<Call>{kOne, kOne, kOne}, {kTwo, kOne, kOne}}) {
      EXPECT_NE(WrongWith(ranks, calls, {.releases = false}), "");
      EXPECT_NE(WrongWith(ranks, calls, {.acquires = false}), "");
      EXPECT_NE(WrongWith(ranks, calls, {.two_halves = false}), "");
      EXPECT_NE(WrongWith(ranks, calls, {.waits_for_last = false}), "");
      EXPECT_NE(WrongWith(ranks, calls, {.behind = 1}), "");
      EXPECT_EQ(WrongWith(ranks, calls, {.signals_last = false}), "all wait for ever");
    }
    EXPECT_NE(WrongWith(ranks, {kTwo, kOne, kOne}, {.meets_again = false}), "");
  }
  // One half would do for two shots alone: who lays out a message has met everybody after they had read the last.
  EXPECT_EQ(WrongWith(2, {kTwo, kTwo, kTwo}, {.two_halves = false}), "");
}

}  // namespace
}  // namespace altiplano

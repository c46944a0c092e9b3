#include "tests/sim/fake_executor_testlib.h"

#include <set>

#include "server/base/strings.h"

namespace altiplano::sim {

namespace {
constexpr TokenId kPoison = -12345;
}

FakeExecutor::FakeExecutor(const FakeModel& model, const SchedulerOptions& options, int32_t max_servable)
    : model_(model),
      options_(options),
      max_servable_(max_servable),
      cells_(static_cast<size_t>(options.num_blocks * options.block_size)),
      slots_(static_cast<size_t>(options.max_running)) {}

std::string FakeExecutor::Judge(const StepPlan& plan, const StepPlan* running) const {
  const int32_t block_size = options_.block_size;
  if (plan.sequences.empty()) return "an empty plan";
  if (static_cast<int32_t>(plan.tokens.size()) > options_.token_budget) return "the token budget is exceeded";
  if (plan.num_prefill_tokens > static_cast<int32_t>(plan.tokens.size())) return "more prefill tokens than tokens";
  if (std::string wrong = JudgeKnownBlocks(plan); !wrong.empty()) return wrong;
  const BlockTables tables = TablesOf(plan);
  std::map<int32_t, size_t> writers;  // block -> planned sequence that writes it
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const PlannedSequence& planned = plan.sequences[i];
    const int32_t end = planned.first_position + planned.num_tokens;
    if (planned.num_tokens < 1 || planned.first_position < 0) return "a planned sequence without tokens";
    if (end >= max_servable_) return StrCat("position ", end - 1, " cannot be of use: ", max_servable_, " are served");
    if (planned.num_blocks * block_size < end) return "blocks do not cover the positions";
    for (int32_t b = planned.first_position / block_size; b <= (end - 1) / block_size; ++b) {
      const int32_t block = tables[i][static_cast<size_t>(b)];
      if (block < 0 || block >= options_.num_blocks) return StrCat("no such block: ", block);
      if (!writers.emplace(block, i).second) return StrCat("block ", block, " is written by two");
    }
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    for (int32_t block : tables[i]) {
      auto writer = writers.find(block);
      if (writer != writers.end() && writer->second != i) return StrCat("block ", block, " is written and read");
    }
  }
  return running == nullptr ? "" : JudgeInFlight(plan, tables, writers, *running);
}

// A slot keeps its sequence's blocks from plan to plan, and knows none of a new one's.
std::string FakeExecutor::JudgeKnownBlocks(const StepPlan& plan) const {
  std::set<int32_t> slots, fresh;
  for (const SlotInit& init : plan.slot_inits) fresh.insert(init.slot);
  for (const PlannedSequence& planned : plan.sequences) {
    if (planned.slot < 0 || planned.slot >= options_.max_running || !slots.insert(planned.slot).second) {
      return StrCat("slot ", planned.slot, " is used twice or unknown");
    }
    const size_t known = fresh.contains(planned.slot) ? 0 : slots_[static_cast<size_t>(planned.slot)].blocks.size();
    if (planned.known_blocks != static_cast<int32_t>(known) || planned.new_blocks() < 0) {
      return StrCat("of ", planned.num_blocks, " blocks, slot ", planned.slot, " is to know ", planned.known_blocks,
                    ", but knows ", known);
    }
  }
  return "";
}

FakeExecutor::BlockTables FakeExecutor::TablesOf(const StepPlan& plan) const {
  BlockTables tables;
  for (const PlannedSequence& planned : plan.sequences) {
    std::vector<int32_t>& table = tables.emplace_back(slots_[static_cast<size_t>(planned.slot)].blocks);
    table.resize(static_cast<size_t>(planned.known_blocks));
    const auto begin = plan.block_ids.begin() + planned.block_begin;
    table.insert(table.end(), begin, begin + planned.new_blocks());
  }
  return tables;
}

// A block in use by the step in flight must not be written for anybody else: it may still be read or written there.
std::string FakeExecutor::JudgeInFlight(const StepPlan& plan, const BlockTables& tables,
                                        const std::map<int32_t, size_t>& writers, const StepPlan& running) const {
  for (size_t i = 0; i < running.sequences.size(); ++i) {
    const PlannedSequence& other = running.sequences[i];
    for (size_t b = 0; b < executed_[i].size(); ++b) {
      const int32_t block = executed_[i][b];
      auto writer = writers.find(block);
      if (writer == writers.end()) continue;
      const PlannedSequence& planned = plan.sequences[writer->second];
      const std::vector<int32_t>& table = tables[writer->second];
      const bool same_place = b < table.size() && table[b] == block;
      if (planned.request != other.request || planned.sequence != other.sequence || !same_place) {
        return StrCat("block ", block, " is reused while a step in flight still touches it");
      }
    }
  }
  return "";
}

StepResult FakeExecutor::Execute(const StepPlan& plan, const std::vector<size_t>& make_nan) {
  StepResult result;
  result.step = plan.step;
  InitSlots(plan);
  executed_ = TablesOf(plan);
  for (size_t i = 0; i < executed_.size(); ++i) {
    slots_[static_cast<size_t>(plan.sequences[i].slot)].blocks = executed_[i];
  }
  size_t next_nan = 0;
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const bool nan = next_nan < make_nan.size() && make_nan[next_nan] == i;
    next_nan += nan;
    RunSequence(plan, plan.sequences[i], nan, &result);
  }
  return result;
}

void FakeExecutor::InitSlots(const StepPlan& plan) {
  for (const SlotInit& init : plan.slot_inits) {
    Slot& slot = slots_[static_cast<size_t>(init.slot)];
    slot = Slot{init.request, init.sequence, -1, -1, init.output_history, {}};
    if (!init.request->sampling.NeedsHistory() && !init.output_history.empty()) error_ = "history without need";
  }
}

FakeExecutor::Cell& FakeExecutor::At(const PlannedSequence& planned, int32_t position) {
  const std::vector<int32_t>& blocks = slots_[static_cast<size_t>(planned.slot)].blocks;
  const int32_t block = blocks[static_cast<size_t>(position / options_.block_size)];
  return cells_[static_cast<size_t>(block * options_.block_size + position % options_.block_size)];
}

void FakeExecutor::Complain(const StepPlan& plan, const PlannedSequence& planned, const std::string& what) {
  if (!error_.empty()) return;
  error_ = StrCat("step ", plan.step, ", request ", planned.request, " sequence ", planned.sequence, ": ", what);
}

// Folds what the block table says lies before the chunk; and poisons the blocks that begin in the chunk, which must
// hold nothing that anybody still reads.
FakeExecutor::Row FakeExecutor::ReadContext(const StepPlan& plan, const PlannedSequence& planned) {
  Row row;
  row.attention = FakeModel::Root(*slots_[static_cast<size_t>(planned.slot)].request);
  for (int32_t p = 0; p < planned.first_position; ++p) {
    const Cell& cell = At(planned, p);
    if (cell.token == kPoison) Complain(plan, planned, StrCat("reads poison at position ", p));
    if (cell.position != p) Complain(plan, planned, StrCat("finds position ", cell.position, " at position ", p));
    row.attention = FakeModel::Attend(row.attention, cell.value);
    row.nan |= cell.nan;
  }
  const int32_t block_size = options_.block_size;
  for (int32_t b = (planned.first_position + block_size - 1) / block_size; b < planned.num_blocks; ++b) {
    for (int32_t i = 0; i < block_size; ++i) At(planned, b * block_size + i) = {0xdead, kPoison, -2, false};
  }
  return row;
}

void FakeExecutor::RunSequence(const StepPlan& plan, const PlannedSequence& planned, bool make_nan,
                               StepResult* result) {
  Slot& slot = slots_[static_cast<size_t>(planned.slot)];
  if (slot.request == nullptr || slot.request->id != StrCat(planned.request) || slot.sequence != planned.sequence) {
    Complain(plan, planned, StrCat("slot ", planned.slot, " was set up for somebody else"));
    slot.request == nullptr ? (void)(slot.request = std::make_shared<Request>()) : (void)0;
  }
  if (slot.next_position >= 0 && slot.next_position != planned.first_position) {
    Complain(plan, planned, StrCat("goes on at ", planned.first_position, ", not at ", slot.next_position));
  }
  slot.next_position = planned.first_position + planned.num_tokens;

  Row row = ReadContext(plan, planned);
  row.nan |= make_nan;
  std::vector<TokenScore> scores;
  for (int32_t i = 0; i < planned.num_tokens; ++i) {
    const int32_t position = planned.first_position + i;
    TokenId token = plan.tokens[static_cast<size_t>(planned.token_begin + i)];
    const bool from_slot = planned.input_from_slot && i + 1 == planned.num_tokens;
    if (from_slot != (token == -1)) Complain(plan, planned, "a token without a value");
    if (from_slot) token = slot.last_sampled;
    Cell& cell = At(planned, position);
    cell = {FakeModel::Value(token, position, row.attention), token, position, row.nan};
    row.attention = FakeModel::Attend(row.attention, cell.value);
    if (i < planned.num_prompt_scores) {
      TokenScore& score = scores.emplace_back();
      score.token = plan.prompt_score_ids[static_cast<size_t>(planned.prompt_score_begin + i)];
      score.logprob = FakeModel::Score(row.attention, score.token);
      score.finite = !row.nan;
    }
  }
  if (planned.num_prompt_scores > 0) result->prompt_scores.push_back(std::move(scores));
  if (!planned.sample) return;
  TokenScore& score = result->sampled.emplace_back();
  score.token =
      model_.Next(*slot.request, slot.sequence, slot.next_position, row.attention, slot.history, planned.ban_stops);
  score.finite = !row.nan;
  slot.last_sampled = row.nan ? 0 : score.token;
  slot.history.push_back(score.token);
}

}  // namespace altiplano::sim

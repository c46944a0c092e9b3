#include "server/engine/decode_graphs.h"

#include <algorithm>

namespace altiplano {

namespace {

// The steps of a ladder below `most`, then `most` itself where the ladder reaches it, smallest first.
template <size_t kSteps>
std::vector<int32_t> Rungs(const int32_t (&ladder)[kSteps], int32_t unit, int32_t most) {
  std::vector<int32_t> rungs;
  for (const int32_t step : ladder) {
    const int32_t rung = std::min(most, (step + unit - 1) / unit);
    if (rung > 0 && (rungs.empty() || rungs.back() < rung)) rungs.push_back(rung);
  }
  return rungs;
}

}  // namespace

std::vector<DecodeShape> PlanDecodeGraphs(const DecodeGraphLimits& limits) {
  std::vector<DecodeShape> shapes;
  for (const int32_t sequences : Rungs(kGraphSequences, 1, limits.max_sequences)) {
    for (const int32_t pages : Rungs(kGraphContexts, limits.page_size, limits.max_pages)) {
      shapes.push_back({sequences, pages});
    }
  }
  return shapes;
}

size_t FindDecodeShape(const std::vector<DecodeShape>& shapes, const StepPlan& plan) {
  const auto sequences = static_cast<int32_t>(plan.sequences.size());
  int32_t pages = 1;
  for (const PlannedSequence& sequence : plan.sequences) {
    if (sequence.num_tokens != 1 || sequence.num_prompt_scores > 0) return shapes.size();
    pages = std::max(pages, sequence.num_blocks);
  }
  const auto fits = [&](const DecodeShape& shape) { return shape.sequences >= sequences && shape.pages >= pages; };
  return static_cast<size_t>(std::find_if(shapes.begin(), shapes.end(), fits) - shapes.begin());
}

}  // namespace altiplano

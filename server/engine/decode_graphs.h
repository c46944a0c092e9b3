// Which steps are replayed from CUDA graphs: those in which every sequence has one token, padded to a shape of a small
// ladder. Grids and addresses of a graph are those of its shape; all that differs between steps is read from memory.
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/scheduler/step_plan.h"

namespace altiplano {

struct DecodeShape {
  int32_t sequences = 0;  // and tokens, and rows of logits
  int32_t pages = 0;      // that a block table has room for
  bool operator==(const DecodeShape&) const = default;
};

// A padded row costs next to nothing while a step is bound by reading the weights; still at most every second row is
// one, and from 32 on every third.
inline constexpr int32_t kGraphSequences[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256};
// Tokens of the longest context. What the host sends are whole block tables: one room for all would cost short contexts
// much more than it needs.
inline constexpr int32_t kGraphContexts[] = {2048, 8192, 32768, 131072};

struct DecodeGraphLimits {
  int32_t max_sequences = 0;  // of a step; 0: no graphs
  int32_t max_pages = 0;      // of a sequence
  int32_t page_size = 0;
};
// Smallest batch first, and of each batch the shortest contexts first: where there is memory for a part of them, it is
// for steps that are over soonest and so can least wait for launches.
std::vector<DecodeShape> PlanDecodeGraphs(const DecodeGraphLimits& limits);

// The index of the smallest shape that the step fits, or shapes.size(): it does not decode only, or is too large.
size_t FindDecodeShape(const std::vector<DecodeShape>& shapes, const StepPlan& plan);

}  // namespace altiplano

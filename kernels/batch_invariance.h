// Whether the bits of a row of Linear may depend on how many rows there are. On the CPU they never do; on a GPU products
// of many tokens otherwise go to the vendor's library, which is faster and chooses by their number.
#pragma once

namespace altiplano {

// Of the whole process; before the first op.
void SetBatchInvariant(bool on);
bool IsBatchInvariant();

}  // namespace altiplano

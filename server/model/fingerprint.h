// Whether two machines have the same checkpoint, without reading all of it.
#pragma once

#include <string>

#include "server/base/status.h"
#include "server/model/checkpoint.h"

namespace altiplano {

// 16 hexadecimal digits over names, formats and shapes of all tensors, all vectors, and the first row of every matrix:
// other weights of the same shape differ in these. Errors as Checkpoint::Read.
StatusOr<std::string> Fingerprint(const Checkpoint& checkpoint);

}  // namespace altiplano

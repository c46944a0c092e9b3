#include "server/model/fingerprint.h"

#include <algorithm>
#include <vector>

#include "server/base/sha256.h"
#include "server/base/strings.h"

namespace altiplano {

StatusOr<std::string> Fingerprint(const Checkpoint& checkpoint) {
  Sha256 sha;
  auto add = [&](const std::string& text) { sha.Update(text.c_str(), text.size() + 1); };
  std::vector<const TensorInfo*> tensors;
  for (const TensorInfo& tensor : checkpoint.tensors()) tensors.push_back(&tensor);
  std::sort(tensors.begin(), tensors.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
  std::vector<float> row;
  for (const TensorInfo* tensor : tensors) {
    add(tensor->name);
    add(tensor->dtype);
    for (int64_t n : tensor->shape) add(StrCat(n));
    const int64_t columns = tensor->shape.empty() ? 1 : tensor->shape.back();
    row.resize(static_cast<size_t>(columns));
    uint64_t read = 0;
    RETURN_IF_ERROR(checkpoint.Read(tensor->name, 0, 1, 0, columns, DType::kF32, row.data(), columns, &read));
    sha.Update(row.data(), row.size() * sizeof(float));
  }
  const Sha256Digest digest = sha.Finish();
  return Hex({digest.data(), 8});
}

}  // namespace altiplano

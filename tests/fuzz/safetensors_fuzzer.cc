// Any bytes as a safetensors file: tensors that cover its data exactly, each as large as shape and dtype say.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <string_view>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/model/safetensors.h"

namespace altiplano {
namespace {

void Read(std::string_view bytes) {
  const MemoryReader file("f", bytes);
  const auto tensors = ReadSafetensorsHeader(file);
  if (!tensors.ok()) {
    CHECK(tensors.status().code() == Code::kInvalidArgument || tensors.status().code() == Code::kDataLoss);
    CHECK(tensors.status().message().starts_with("f: ") && tensors.status().message().size() <= 600);
    return;
  }
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  uint64_t at = sizeof header + header;
  std::set<std::string_view> names;
  for (const SafetensorsTensor& tensor : *tensors) {
    CHECK(names.insert(tensor.name).second && IsValidUtf8(tensor.name));
    CHECK(tensor.shape.size() <= kMaxSafetensorsRank);
    CHECK(tensor.begin == at && tensor.end >= at);
    at = tensor.end;
    uint64_t elements = 1;
    for (const int64_t n : tensor.shape) {
      CHECK(n >= 0);
      elements *= static_cast<uint64_t>(n);
    }
    const uint64_t size = tensor.end - tensor.begin;
    CHECK(elements == 0 ? size == 0 : size % elements == 0 && size / elements >= 1 && size / elements <= 8);
  }
  CHECK(at == bytes.size());
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  altiplano::Read(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}

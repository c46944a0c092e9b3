// Any bytes as a GGUF file. One that opens is a whole model: every row of every tensor can be read, by itself as in one
// piece, and what the file says of itself can be printed.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/gguf.h"
#include "server/model/gguf_checkpoint.h"
#include "server/model/inspect.h"

namespace altiplano {
namespace {

void CheckRefusal(const Status& status) {
  CHECK(status.code() == Code::kInvalidArgument || status.code() == Code::kUnimplemented ||
        status.code() == Code::kDataLoss);
  CHECK(status.message().starts_with("f: "));
}

void ReadTensor(const Checkpoint& checkpoint, const TensorInfo& tensor) {
  const int64_t rows = tensor.shape.size() == 1 ? 1 : tensor.shape[0], cols = tensor.shape.back();
  std::vector<float> whole(static_cast<size_t>(rows * cols)), row(static_cast<size_t>(cols));
  uint64_t bytes_read = 0;
  CHECK(checkpoint.Read(tensor.name, 0, rows, 0, cols, DType::kF32, whole.data(), cols, &bytes_read).ok());
  CHECK(bytes_read == tensor.bytes);
  for (int64_t r = 0; r < rows; ++r) {
    CHECK(checkpoint.Read(tensor.name, r, 1, 0, cols, DType::kF32, row.data(), cols).ok());
    CHECK(std::memcmp(row.data(), whole.data() + r * cols, row.size() * sizeof(float)) == 0);
  }
  std::vector<uint16_t> last(static_cast<size_t>(rows));
  CHECK(checkpoint.Read(tensor.name, 0, rows, cols - 1, 1, DType::kBF16, last.data(), 1).ok());
  CHECK(!checkpoint.Read(tensor.name, 0, rows + 1, 0, cols, DType::kF32, whole.data(), cols).ok());
}

void Open(std::string_view bytes) {
  const auto file = std::make_shared<MemoryReader>("f", bytes);
  if (const auto gguf = ReadGguf(*file); gguf.ok()) {
    std::set<std::string_view> names;
    for (const GgufTensor& tensor : gguf->tensors) {
      CHECK(names.insert(tensor.name).second);
      CHECK(tensor.offset <= bytes.size() && tensor.bytes <= bytes.size() - tensor.offset);
    }
  } else {
    CheckRefusal(gguf.status());
  }
  const auto opened = OpenGguf(file);
  if (!opened.ok()) return CheckRefusal(opened.status());
  const Checkpoint& checkpoint = **opened;
  CHECK(CheckModelConfig(checkpoint.config()).ok());
  uint64_t bytes_of_tensors = 0;
  for (const TensorInfo& tensor : checkpoint.tensors()) {
    bytes_of_tensors += tensor.bytes;
    ReadTensor(checkpoint, tensor);
  }
  CHECK(checkpoint.total_bytes() == bytes_of_tensors && bytes_of_tensors < bytes.size());
  const Inspection inspection = Inspect(checkpoint);
  CHECK(inspection.parameters == checkpoint.config().parameters());
  CHECK(!InspectText(inspection, true).empty());
  CHECK(IsValidUtf8(InspectJson(inspection).dump(-1, ' ', false, OrderedJson::error_handler_t::replace)));
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  altiplano::Open(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}

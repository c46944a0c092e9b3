#include "server/model/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <set>

#include "server/base/strings.h"
#include "server/model/checkpoint_tensors.h"

namespace altiplano {

namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and safetensors are read as they lie");

// Value types of the metadata, as numbered in the file.
enum ValueType : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64, kTypes };
constexpr std::array<uint64_t, kTypes> kLeastBytes = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};

// Tensor types as numbered in the file.
std::optional<StorageType> StorageTypeOf(uint32_t type) {
  switch (type) {
    case 0:
      return StorageType::kF32;
    case 1:
      return StorageType::kF16;
    case 2:
      return StorageType::kQ4_0;
    case 3:
      return StorageType::kQ4_1;
    case 8:
      return StorageType::kQ8_0;
    case 12:
      return StorageType::kQ4_K;
    case 14:
      return StorageType::kQ6_K;
    case 30:
      return StorageType::kBF16;
    default:
      return std::nullopt;
  }
}
std::string UnreadTypeName(uint32_t type) {
  constexpr std::pair<uint32_t, std::string_view> kNames[] = {
      {6, "Q5_0"},   {7, "Q5_1"},     {9, "Q8_1"},    {10, "Q2_K"},    {11, "Q3_K"},  {13, "Q5_K"},
      {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"},
      {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},   {26, "I32"},
      {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},  {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},
  };
  for (const auto& [number, name] : kNames) {
    if (number == type) return std::string(name);
  }
  return StrCat("number ", type);
}

// Reads forward in large steps. The first failure stays; reads after it give zeros.
class Cursor {
 public:
  explicit Cursor(const ByteSource& file) : file_(file), buffer_(kBuffer) {}

  const Status& status() const { return status_; }
  uint64_t position() const { return position_; }
  uint64_t left() const { return std::min(file_.size(), kMaxGgufHeader) - position_; }

  void Fail(Code code, std::string why) {
    if (status_.ok()) status_ = Status(code, StrCat(file_.name(), ": ", why));
  }
  // False (with a status) when fewer than `bytes` remain: asked before anything of that size is allocated.
  bool Need(uint64_t bytes, std::string_view what) {
    if (!status_.ok()) return false;
    if (bytes <= left()) return true;
    if (file_.size() > kMaxGgufHeader) {
      Fail(Code::kInvalidArgument,
           StrCat(what, " at offset ", position_, " needs ", bytes, " bytes and would pass the limit of ",
                  kMaxGgufHeader, " bytes for the header"));
    } else {
      Fail(Code::kDataLoss, StrCat(what, " at offset ", position_, " needs ", bytes, " bytes, but only ", left(),
                                   " are left in the file: truncated?"));
    }
    return false;
  }
  template <typename T>
  T Take(std::string_view what) {
    T value{};
    if (Need(sizeof(T), what)) Copy(&value, sizeof(T));
    return value;
  }
  std::string TakeString(std::string_view what, uint64_t max = kMaxGgufHeader) {
    const uint64_t length = Take<uint64_t>(what);
    if (length > max) {
      Fail(Code::kInvalidArgument, StrCat(what, " at offset ", position_, " has ", length, " bytes, at most ", max));
    }
    if (!Need(length, what)) return {};
    std::string text(static_cast<size_t>(length), '\0');
    Copy(text.data(), text.size());
    return text;
  }
  void Skip(uint64_t bytes, std::string_view what) {
    if (Need(bytes, what)) position_ += bytes;
  }

 private:
  static constexpr size_t kBuffer = 256 << 10;

  void Copy(void* out, size_t bytes) {
    char* to = static_cast<char*>(out);
    while (bytes > 0 && status_.ok()) {
      if (position_ < buffer_begin_ || position_ >= buffer_begin_ + buffer_filled_) {
        buffer_begin_ = position_;
        buffer_filled_ = static_cast<size_t>(std::min<uint64_t>(kBuffer, file_.size() - position_));
        status_ = file_.ReadAt(buffer_begin_, buffer_.data(), buffer_filled_);
        if (!status_.ok()) return;
      }
      const size_t at = static_cast<size_t>(position_ - buffer_begin_);
      const size_t n = std::min(bytes, buffer_filled_ - at);
      std::memcpy(to, buffer_.data() + at, n);
      to += n, bytes -= n, position_ += n;
    }
  }

  const ByteSource& file_;
  uint64_t position_ = 0;
  std::vector<char> buffer_;
  uint64_t buffer_begin_ = 0;
  size_t buffer_filled_ = 0;
  Status status_;
};

int64_t TakeInteger(Cursor& in, uint32_t type, std::string_view what) {
  switch (type) {
    case kU8:
      return in.Take<uint8_t>(what);
    case kI8:
      return in.Take<int8_t>(what);
    case kU16:
      return in.Take<uint16_t>(what);
    case kI16:
      return in.Take<int16_t>(what);
    case kU32:
      return in.Take<uint32_t>(what);
    case kI32:
      return in.Take<int32_t>(what);
    case kI64:
      return in.Take<int64_t>(what);
    default:
      break;
  }
  const uint64_t value = in.Take<uint64_t>(what);
  if (value > INT64_MAX) in.Fail(Code::kInvalidArgument, StrCat(what, " is ", value, ", more than 63 bits"));
  return static_cast<int64_t>(value);
}

bool IsInteger(uint32_t type) {
  return type <= kI32 || type == kU64 || type == kI64;
}

bool CheckType(Cursor& in, uint32_t type, std::string_view what) {
  if (type < kTypes) return true;
  in.Fail(Code::kInvalidArgument, StrCat(what, " has value type ", type, ", expected 0 to ", kTypes - 1));
  return false;
}

constexpr int kMaxArrayDepth = 4;

void SkipArray(Cursor& in, uint32_t type, uint64_t count, std::string_view what, int depth);

void SkipElement(Cursor& in, uint32_t type, std::string_view what, int depth) {
  if (type == kString) {
    in.Skip(in.Take<uint64_t>(what), what);
  } else if (type == kArray) {
    const uint32_t inner = in.Take<uint32_t>(what);
    const uint64_t count = in.Take<uint64_t>(what);
    SkipArray(in, inner, count, what, depth + 1);
  } else {
    in.Skip(kLeastBytes[type], what);
  }
}

// Also bounds `count`: each element takes some bytes of the file.
bool CheckArray(Cursor& in, uint32_t type, uint64_t count, std::string_view what) {
  if (!in.status().ok() || !CheckType(in, type, what)) return false;
  if (count > in.left() / kLeastBytes[type]) {
    in.Need(UINT64_MAX / kLeastBytes[type] < count ? UINT64_MAX : count * kLeastBytes[type], what);
    return false;
  }
  return true;
}

void SkipArray(Cursor& in, uint32_t type, uint64_t count, std::string_view what, int depth) {
  if (!CheckArray(in, type, count, what)) return;
  if (depth > kMaxArrayDepth) {
    return in.Fail(Code::kInvalidArgument, StrCat(what, " nests arrays deeper than ", kMaxArrayDepth));
  }
  if (type != kString && type != kArray) return in.Skip(count * kLeastBytes[type], what);
  for (uint64_t i = 0; i < count && in.status().ok(); ++i) SkipElement(in, type, what, depth);
}

GgufValue TakeArray(Cursor& in, std::string_view what) {
  const uint32_t type = in.Take<uint32_t>(what);
  const uint64_t count = in.Take<uint64_t>(what);
  if (!CheckArray(in, type, count, what)) return GgufSkippedArray{};
  if (type != kString && !IsInteger(type)) {
    SkipArray(in, type, count, what, 1);
    return GgufSkippedArray{count};
  }
  if (count > kMaxGgufArray) {
    in.Fail(Code::kInvalidArgument, StrCat(what, " has ", count, " elements, at most ", kMaxGgufArray));
    return GgufSkippedArray{};
  }
  if (type == kString) {
    std::vector<std::string> strings;
    for (uint64_t i = 0; i < count && in.status().ok(); ++i) strings.push_back(in.TakeString(what));
    return strings;
  }
  std::vector<int64_t> integers;
  for (uint64_t i = 0; i < count && in.status().ok(); ++i) integers.push_back(TakeInteger(in, type, what));
  return integers;
}

GgufValue TakeValue(Cursor& in, uint32_t type, std::string_view what) {
  if (!CheckType(in, type, what)) return false;
  if (IsInteger(type)) return TakeInteger(in, type, what);
  switch (type) {
    case kF32:
      return static_cast<double>(in.Take<float>(what));
    case kF64:
      return in.Take<double>(what);
    case kString:
      return in.TakeString(what);
    case kArray:
      return TakeArray(in, what);
    default:
      break;
  }
  const uint8_t value = in.Take<uint8_t>(what);
  if (value > 1) in.Fail(Code::kInvalidArgument, StrCat(what, " is ", value, ", expected a bool (0 or 1)"));
  return value == 1;
}

void TakeMetadata(Cursor& in, uint64_t count, GgufFile* gguf) {
  for (uint64_t i = 0; i < count && in.status().ok(); ++i) {
    std::string key = in.TakeString("a metadata key", kMaxGgufName);
    const uint32_t type = in.Take<uint32_t>("a metadata value's type");
    if (!in.status().ok()) return;
    const std::string what = StrCat("metadata ", key);
    GgufValue value = TakeValue(in, type, what);
    if (!gguf->metadata.emplace(std::move(key), std::move(value)).second) {
      in.Fail(Code::kInvalidArgument, StrCat(what, " appears twice"));
    }
  }
}

GgufTensor TakeTensor(Cursor& in) {
  GgufTensor tensor;
  tensor.name = in.TakeString("a tensor's name", kMaxGgufName);
  const std::string what = StrCat("tensor ", tensor.name);
  auto fail = [&](Code code, std::string why) { in.Fail(code, StrCat(what, ": ", why)); };
  const uint32_t rank = in.Take<uint32_t>(what);
  if (rank < 1 || rank > 4) fail(Code::kInvalidArgument, StrCat("has ", rank, " dimensions, expected 1 to 4"));
  for (uint32_t d = 0; d < rank && in.status().ok(); ++d) {
    const uint64_t n = in.Take<uint64_t>(what);
    if (n > INT64_MAX) fail(Code::kInvalidArgument, StrCat("dimension ", d, " is ", n, ", more than 63 bits"));
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(n));
  }
  const uint32_t type = in.Take<uint32_t>(what);
  tensor.offset = in.Take<uint64_t>(what);
  if (!in.status().ok()) return tensor;
  std::optional<StorageType> storage = StorageTypeOf(type);
  if (!storage) {
    fail(Code::kUnimplemented, StrCat("type ", UnreadTypeName(type),
                                      " is not supported, only F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K"));
    return tensor;
  }
  tensor.type = *storage;
  const StorageTraits& traits = Traits(*storage);
  if (tensor.shape.back() % traits.block_elements != 0) {
    fail(Code::kInvalidArgument, StrCat("rows of ", tensor.shape.back(), " elements, expected a multiple of ",
                                        traits.block_elements, " for ", traits.name));
  }
  tensor.bytes = static_cast<uint64_t>(traits.block_bytes);
  for (size_t d = 0; d < tensor.shape.size(); ++d) {
    uint64_t n = static_cast<uint64_t>(tensor.shape[d]);
    if (d + 1 == tensor.shape.size()) n /= static_cast<uint64_t>(traits.block_elements);
    if (__builtin_mul_overflow(tensor.bytes, n, &tensor.bytes)) {
      fail(Code::kInvalidArgument,
           StrCat("shape ", ShowShape(tensor.shape), " of ", traits.name, " overflows 64 bits"));
      break;
    }
  }
  return tensor;
}

StatusOr<uint64_t> Alignment(const std::string& file, const GgufFile& gguf) {
  auto it = gguf.metadata.find("general.alignment");
  if (it == gguf.metadata.end()) return uint64_t{32};
  const int64_t* value = std::get_if<int64_t>(&it->second);
  if (value == nullptr || *value < 1 || *value > 1 << 20 || !std::has_single_bit(static_cast<uint64_t>(*value))) {
    return Status(Code::kInvalidArgument, StrCat(file, ": metadata general.alignment is ",
                                                 value ? StrCat(*value) : std::string("not an integer"),
                                                 ", expected a power of two up to 1 MiB"));
  }
  return static_cast<uint64_t>(*value);
}

// Turns offsets from the start of the data into offsets in the file, sorts by them, and demands an exact cover.
Status PlaceTensors(const ByteSource& file, uint64_t header_end, uint64_t alignment, std::vector<GgufTensor>* tensors) {
  auto align = [&](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };
  const uint64_t data_begin = align(header_end);
  const uint64_t data_bytes = file.size() > data_begin ? file.size() - data_begin : 0;
  auto bad = [&](const GgufTensor& t, Code code, std::string why) {
    return Status(code, StrCat(file.name(), ": tensor ", t.name, ": ", why));
  };
  std::sort(tensors->begin(), tensors->end(), [](const GgufTensor& a, const GgufTensor& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  std::set<std::string_view> names;
  uint64_t end = 0;
  std::string_view previous = "the start of the data";
  for (GgufTensor& t : *tensors) {
    if (!names.insert(t.name).second) return bad(t, Code::kInvalidArgument, "the name appears twice");
    if (t.offset > data_bytes || t.bytes > data_bytes - t.offset) {
      return bad(t, Code::kDataLoss,
                 StrCat("has ", t.bytes, " bytes at offset ", t.offset, " of the data, but the file holds ", data_bytes,
                        " bytes of data: truncated?"));
    }
    if (t.offset != align(end)) {
      return bad(t, Code::kInvalidArgument,
                 StrCat(t.offset < end ? "overlaps " : "does not follow ", previous, ": begins at ", t.offset,
                        ", expected ", align(end)));
    }
    end = t.offset + t.bytes;
    previous = t.name;
  }
  if (data_bytes > align(end)) {
    return Status(Code::kInvalidArgument,
                  StrCat(file.name(), ": ", data_bytes - align(end), " bytes after the last tensor belong to none"));
  }
  for (GgufTensor& t : *tensors) t.offset += data_begin;
  return OkStatus();
}

Status CheckVersion(const std::string& file, uint32_t version) {
  if (version == 2 || version == 3) return OkStatus();
  if (__builtin_bswap32(version) <= 3) {
    return Status(Code::kUnimplemented, StrCat(file, ": a big-endian GGUF file is not supported"));
  }
  return Status(Code::kUnimplemented, StrCat(file, ": GGUF version ", version, " is not supported, only 2 and 3"));
}

}  // namespace

bool HasGgufMagic(const ByteSource& file) {
  char magic[4];
  return file.size() >= sizeof magic && file.ReadAt(0, magic, sizeof magic).ok() && std::memcmp(magic, "GGUF", 4) == 0;
}

StatusOr<GgufFile> ReadGguf(const ByteSource& file) {
  if (!HasGgufMagic(file)) {
    return Status(Code::kInvalidArgument, StrCat(file.name(), ": does not begin with \"GGUF\""));
  }
  Cursor in(file);
  in.Skip(4, "the magic");
  GgufFile gguf;
  gguf.version = in.Take<uint32_t>("the version");
  RETURN_IF_ERROR(in.status());
  RETURN_IF_ERROR(CheckVersion(file.name(), gguf.version));
  const uint64_t tensor_count = in.Take<uint64_t>("the number of tensors");
  const uint64_t metadata_count = in.Take<uint64_t>("the number of metadata entries");
  RETURN_IF_ERROR(in.status());
  if (tensor_count > kMaxGgufEntries || metadata_count > kMaxGgufEntries) {
    return Status(Code::kInvalidArgument,
                  StrCat(file.name(), ": claims ", tensor_count, " tensors and ", metadata_count,
                         " metadata entries, at most ", kMaxGgufEntries, " of each"));
  }
  TakeMetadata(in, metadata_count, &gguf);
  for (uint64_t i = 0; i < tensor_count && in.status().ok(); ++i) gguf.tensors.push_back(TakeTensor(in));
  RETURN_IF_ERROR(in.status());
  ASSIGN_OR_RETURN(const uint64_t alignment, Alignment(file.name(), gguf));
  RETURN_IF_ERROR(PlaceTensors(file, in.position(), alignment, &gguf.tensors));
  return gguf;
}

}  // namespace altiplano

#include "server/model/safetensors.h"

#include <algorithm>
#include <array>
#include <set>
#include <string_view>
#include <utility>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/checkpoint_tensors.h"

namespace altiplano {

namespace {

constexpr size_t kMaxName = 4096;
constexpr size_t kMaxTensors = 1'000'000;

// Bytes of an element; 0 when unknown. Formats of less than a byte an element are not among them.
uint64_t ElementBytes(std::string_view dtype) {
  constexpr std::pair<std::string_view, uint64_t> kTypes[] = {
      {"BF16", 2}, {"F32", 4},     {"F16", 2},     {"F64", 8},     {"BOOL", 1}, {"U8", 1},
      {"I8", 1},   {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1}, {"I16", 2},  {"U16", 2},
      {"I32", 4},  {"U32", 4},     {"I64", 8},     {"U64", 8},     {"C64", 8},
  };
  for (const auto& [name, bytes] : kTypes) {
    if (name == dtype) return bytes;
  }
  return 0;
}

// Reads the header as a stream of events, so that a hostile one costs no more memory than its tensors' names.
class HeaderReader final : public nlohmann::json_sax<Json> {
 public:
  const std::string& error() const { return error_; }
  std::vector<SafetensorsTensor>& tensors() { return tensors_; }

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_float(number_float_t, const string_t& text) override {
    return Unexpected(StrCat("the number ", text.substr(0, 32)));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }
  bool number_integer(number_integer_t value) override { return Unexpected(StrCat("the number ", value)); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) {
      if (value > INT64_MAX) return Fail(StrCat("dimension ", value, " is too large"));
      if (tensor_.shape.size() == kMaxSafetensorsRank)
        return Fail(StrCat("more than ", kMaxSafetensorsRank, " dimensions"));
      tensor_.shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (state_ == State::kOffsets) {
      if (offsets_seen_ == 2) return Fail("data_offsets has more than two numbers");
      offsets_[offsets_seen_++] = value;
      return true;
    }
    return Unexpected(StrCat("the number ", value));
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) return true;
    if (state_ != State::kTensor || field_ != "dtype") return Unexpected("a string");
    tensor_.dtype = value;
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ == State::kStart) return Enter(State::kRoot);
    if (state_ != State::kRoot) return Unexpected("an object");
    if (tensor_.name == "__metadata__") return Enter(State::kMetadata);
    if (tensors_.size() == kMaxTensors) return Fail(StrCat("more than ", kMaxTensors, " tensors"));
    has_dtype_ = has_shape_ = has_offsets_ = false;
    offsets_seen_ = 0;
    tensor_.shape.clear();
    return Enter(State::kTensor);
  }

  bool key(string_t& key) override {
    if (state_ == State::kMetadata) return true;
    if (state_ == State::kRoot) {
      if (key.size() > kMaxName) return Fail(StrCat("a tensor's name has ", key.size(), " bytes"));
      tensor_.name = key;
      return names_.insert(key).second || Fail("the name appears twice");
    }
    field_ = key;
    bool* seen = key == "dtype"          ? &has_dtype_
                 : key == "shape"        ? &has_shape_
                 : key == "data_offsets" ? &has_offsets_
                                         : nullptr;
    if (seen == nullptr) return Fail(StrCat("unknown field \"", Excerpt(key, 64), "\""));
    if (*seen) return Fail(StrCat(key, " appears twice"));
    return *seen = true;
  }

  bool end_object() override {
    if (state_ == State::kMetadata) return Enter(State::kRoot);
    if (state_ != State::kTensor) return true;  // the whole header
    if (!has_dtype_ || !has_shape_ || !has_offsets_) {
      return Fail(StrCat("has no ", !has_dtype_ ? "dtype" : !has_shape_ ? "shape" : "data_offsets"));
    }
    tensor_.begin = offsets_[0];
    tensor_.end = offsets_[1];
    tensors_.push_back(tensor_);
    return Enter(State::kRoot);
  }

  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && field_ == "shape") return Enter(State::kShape);
    if (state_ == State::kTensor && field_ == "data_offsets") return Enter(State::kOffsets);
    return Unexpected("an array");
  }

  bool end_array() override {
    if (state_ == State::kOffsets && offsets_seen_ != 2) return Fail("data_offsets has fewer than two numbers");
    return Enter(State::kTensor);
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    error_ = StrCat("the header is not valid JSON: ", JsonErrorText(position, e));
    return false;
  }

 private:
  enum class State { kStart, kRoot, kMetadata, kTensor, kShape, kOffsets };

  bool Enter(State state) {
    state_ = state;
    return true;
  }
  bool Fail(std::string_view why) {
    error_ = state_ == State::kStart || tensor_.name.empty() ? std::string(why)
                                                             : StrCat("tensor ", Excerpt(tensor_.name, 200), ": ", why);
    return false;
  }
  bool Unexpected(std::string_view what) {
    switch (state_) {
      case State::kStart:
        return Fail(StrCat("the header is ", what, ", expected an object"));
      case State::kRoot:
        return Fail(StrCat("is ", what, ", expected an object"));
      case State::kMetadata:
        return Fail(StrCat("has ", what, " as a value, expected strings"));
      case State::kTensor:
        return Fail(StrCat(field_, " is ", what));
      case State::kShape:
        return Fail(StrCat("shape has ", what, ", expected non-negative integers"));
      case State::kOffsets:
        return Fail(StrCat("data_offsets has ", what, ", expected non-negative integers"));
    }
    return false;
  }

  State state_ = State::kStart;
  std::string field_;         // of the current tensor
  SafetensorsTensor tensor_;  // the current one
  bool has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
  std::array<uint64_t, 2> offsets_{};
  size_t offsets_seen_ = 0;
  std::set<std::string> names_;
  std::vector<SafetensorsTensor> tensors_;
  std::string error_;
};

Status CheckSize(const std::string& file, const SafetensorsTensor& tensor, uint64_t data_bytes) {
  auto bad = [&](std::string why) {
    return Status(Code::kInvalidArgument, StrCat(file, ": tensor ", tensor.name, ": ", why));
  };
  uint64_t bytes = ElementBytes(tensor.dtype);
  if (bytes == 0) return bad(StrCat("unknown dtype \"", Excerpt(tensor.dtype, 32), "\""));
  for (int64_t n : tensor.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes)) {
      return bad(StrCat("shape ", ShowShape(tensor.shape), " of ", tensor.dtype, " overflows 64 bits"));
    }
  }
  if (tensor.begin > tensor.end) {
    return bad(StrCat("data_offsets [", tensor.begin, ", ", tensor.end, "] run backwards"));
  }
  if (tensor.end > data_bytes) {
    return Status(Code::kDataLoss, StrCat(file, ": tensor ", tensor.name, ": data_offsets end at ", tensor.end,
                                          ", but the file holds ", data_bytes, " bytes of data: truncated?"));
  }
  if (tensor.end - tensor.begin != bytes) {
    return bad(StrCat("data_offsets span ", tensor.end - tensor.begin, " bytes, expected ", bytes, " for ",
                      tensor.dtype, " ", ShowShape(tensor.shape)));
  }
  return OkStatus();
}

// Sorts by offset and demands that the tensors lie end to end over all of the data.
Status CheckCover(const std::string& file, uint64_t data_bytes, std::vector<SafetensorsTensor>* tensors) {
  std::sort(tensors->begin(), tensors->end(),
            [](const auto& a, const auto& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  uint64_t at = 0;
  const std::string* previous = nullptr;
  for (const SafetensorsTensor& tensor : *tensors) {
    std::string before = previous == nullptr ? std::string("the start of the data") : StrCat("the end of ", *previous);
    if (tensor.begin < at) {
      return Status(Code::kInvalidArgument, StrCat(file, ": tensor ", tensor.name, ": overlaps ", *previous,
                                                   ": begins at ", tensor.begin, ", before ", before, " at ", at));
    }
    if (tensor.begin > at) {
      return Status(Code::kInvalidArgument, StrCat(file, ": tensor ", tensor.name, ": begins at ", tensor.begin,
                                                   ", leaving a gap after ", before, " at ", at));
    }
    at = tensor.end;
    previous = &tensor.name;
  }
  if (at != data_bytes) {
    return Status(Code::kInvalidArgument,
                  StrCat(file, ": ", data_bytes - at, " bytes after the last tensor belong to none"));
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::vector<SafetensorsTensor>> ReadSafetensorsHeader(const ByteSource& file) {
  const std::string& name = file.name();
  if (file.size() < 8) {
    return Status(Code::kDataLoss,
                  StrCat(name, ": has ", file.size(), " bytes, expected a safetensors header: truncated?"));
  }
  uint64_t length;  // little-endian, as are the machines that we run on
  RETURN_IF_ERROR(file.ReadAt(0, &length, sizeof length));
  if (length > kMaxSafetensorsHeader) {
    return Status(Code::kInvalidArgument, StrCat(name, ": the header claims ", length, " bytes, at most ",
                                                 kMaxSafetensorsHeader, " are allowed: not a safetensors file?"));
  }
  if (length > file.size() - 8) {
    return Status(Code::kDataLoss, StrCat(name, ": the header claims ", length, " bytes, but only ", file.size() - 8,
                                          " follow: truncated?"));
  }
  std::string header(static_cast<size_t>(length), '\0');
  RETURN_IF_ERROR(file.ReadAt(8, header.data(), header.size()));
  if (header.empty() || header[0] != '{') {
    return Status(Code::kInvalidArgument,
                  StrCat(name, ": the header does not start with '{': not a safetensors file?"));
  }
  if (const Status status = CheckNoNul(header); !status.ok()) {
    return Status(status.code(), StrCat(name, ": the header is ", status.message()));
  }
  HeaderReader reader;
  if (!Json::sax_parse(header, &reader)) {
    return Status(Code::kInvalidArgument, StrCat(name, ": ", reader.error()));
  }
  const uint64_t data_begin = 8 + length, data_bytes = file.size() - data_begin;
  std::vector<SafetensorsTensor> tensors = std::move(reader.tensors());
  for (const SafetensorsTensor& tensor : tensors) RETURN_IF_ERROR(CheckSize(name, tensor, data_bytes));
  RETURN_IF_ERROR(CheckCover(name, data_bytes, &tensors));
  for (SafetensorsTensor& tensor : tensors) {
    tensor.begin += data_begin;
    tensor.end += data_begin;
  }
  return tensors;
}

}  // namespace altiplano

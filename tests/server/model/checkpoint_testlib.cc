#include "tests/server/model/checkpoint_testlib.h"

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/gguf_checkpoint.h"

namespace altiplano {

namespace {

template <typename T>
std::string Bits(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

struct Format {
  std::string_view dtype;
  uint32_t gguf_type;
  int64_t elements, bytes;
};
constexpr Format kFormats[] = {{"F32", 0, 1, 4},       {"F16", 1, 1, 2},    {"Q4_0", 2, 32, 18},
                               {"Q4_1", 3, 32, 20},    {"Q8_0", 8, 32, 34}, {"Q4_K", 12, 256, 144},
                               {"Q6_K", 14, 256, 210}, {"BF16", 30, 1, 2},  {"I64", 27, 1, 8}};

const Format& FormatOf(std::string_view dtype) {
  for (const Format& format : kFormats) {
    if (format.dtype == dtype) return format;
  }
  CHECK(false);
  return kFormats[0];
}

uint8_t Byte(std::string_view bytes, int64_t i) {
  return static_cast<uint8_t>(bytes[static_cast<size_t>(i)]);
}
uint16_t Word(std::string_view bytes, int64_t i) {
  return static_cast<uint16_t>(Byte(bytes, i) | Byte(bytes, i + 1) << 8);
}

// Bits [first, first + count) of a little-endian bit string.
int BitField(std::string_view bytes, int64_t first, int count) {
  int value = 0;
  for (int b = 0; b < count; ++b) value |= (Byte(bytes, (first + b) / 8) >> ((first + b) % 8) & 1) << b;
  return value;
}

double DecodeQ4K(std::string_view block, int64_t i) {
  std::string_view s = block.substr(4, 12);
  const int64_t group = i / 32;
  // Six-bit numbers: whole in the low bits of a byte for groups 0-3, in two pieces for groups 4-7.
  const int64_t j = group % 4;
  int scale = BitField(s, 8 * j, 6), min = BitField(s, 8 * (4 + j), 6);
  if (group >= 4) {
    scale = BitField(s, 8 * (8 + j), 4) + 16 * BitField(s, 8 * j + 6, 2);
    min = BitField(s, 8 * (8 + j) + 4, 4) + 16 * BitField(s, 8 * (4 + j) + 6, 2);
  }
  const int q = BitField(block.substr(16), 8 * (32 * (group / 2) + i % 32) + 4 * (group % 2), 4);
  return static_cast<double>(HalfValue(Word(block, 0))) * scale * q -
         static_cast<double>(HalfValue(Word(block, 2))) * min;
}

double DecodeQ6K(std::string_view block, int64_t i) {
  const int64_t half = i / 128, run = i % 128 / 32, at = i % 32;
  const int low = BitField(block.substr(static_cast<size_t>(64 * half)), 8 * (32 * (run % 2) + at) + 4 * (run / 2), 4);
  const int high = BitField(block.substr(static_cast<size_t>(128 + 32 * half)), 8 * at + 2 * run, 2);
  const int scale = static_cast<int8_t>(Byte(block, 192 + i / 16));
  return static_cast<double>(HalfValue(Word(block, 208))) * scale * (low + 16 * high - 32);
}

}  // namespace

float HalfValue(uint16_t half) {
  const int sign = half >> 15 ? -1 : 1, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return fraction ? std::nanf("") : static_cast<float>(sign) * INFINITY;
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(fraction, -24));
  return static_cast<float>(sign * std::ldexp(1024 + fraction, exponent - 25));
}

double DecodeOne(std::string_view dtype, std::string_view bytes, int64_t i) {
  const Format& format = FormatOf(dtype);
  std::string_view block =
      bytes.substr(static_cast<size_t>(i / format.elements * format.bytes), static_cast<size_t>(format.bytes));
  const int64_t at = i % format.elements;
  if (dtype == "F32") {
    float value;
    std::memcpy(&value, block.data(), 4);
    return static_cast<double>(value);
  }
  if (dtype == "F16") return static_cast<double>(HalfValue(Word(block, 0)));
  if (dtype == "BF16") {
    const uint32_t bits = static_cast<uint32_t>(Word(block, 0)) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
  }
  if (dtype == "Q4_K") return DecodeQ4K(block, at);
  if (dtype == "Q6_K") return DecodeQ6K(block, at);
  const double d = static_cast<double>(HalfValue(Word(block, 0)));
  if (dtype == "Q8_0") return d * static_cast<int8_t>(Byte(block, 2 + at));
  const std::string_view nibbles = block.substr(dtype == "Q4_1" ? 4 : 2);
  const int q = BitField(nibbles, 8 * (at % 16) + 4 * (at / 16), 4);
  return dtype == "Q4_1" ? d * q + static_cast<double>(HalfValue(Word(block, 2))) : d * (q - 8);
}

uint16_t NearestBF16(double value) {
  auto as_double = [](uint32_t bits) {
    const uint32_t wide = bits << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return static_cast<double>(f);
  };
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  uint32_t low = 0, high = 0x7F80;  // magnitudes of bf16 are ordered as their bits
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (as_double(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - as_double(low);
  const double above = (high == 0x7F80 ? std::ldexp(1.0, 128) : as_double(high)) - magnitude;
  const uint32_t nearest = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(sign | nearest);
}

std::string RandomStored(std::string_view dtype, int64_t elements, std::mt19937_64* random) {
  const Format& format = FormatOf(dtype);
  CHECK(elements % format.elements == 0);
  std::string bytes;
  auto power = [&] { return static_cast<uint16_t>((12 + (*random)() % 6) << 10); };  // a half: 2^-3 .. 2^2
  for (int64_t i = 0; i < elements; i += format.elements) {
    std::string block;
    if (dtype == "F32") {
      block = Bits(std::ldexp(static_cast<float>(static_cast<int64_t>((*random)() % 2000001) - 1000000), -18));
    } else if (dtype == "F16") {
      uint16_t half;
      do half = static_cast<uint16_t>((*random)());
      while ((half >> 10 & 31) == 31);
      block = Bits(half);
    } else if (dtype == "BF16") {
      block = Bits(NearestBF16(static_cast<double>(static_cast<int64_t>((*random)() % 2000001) - 1000000) / 262144));
    } else {
      for (int64_t b = 0; b < format.bytes; ++b) block.push_back(static_cast<char>((*random)()));
      // Scales that are powers of two keep every product and sum exact in f32.
      if (dtype == "Q6_K") {
        block.replace(208, 2, Bits(power()));
      } else {
        block.replace(0, 2, Bits(power()));
        if (dtype == "Q4_1" || dtype == "Q4_K") block.replace(2, 2, Bits(power()));
      }
    }
    bytes += block;
  }
  return bytes;
}

TempFolder::TempFolder() {
  std::string path = (std::filesystem::temp_directory_path() / "altiplano_checkpoint_XXXXXX").string();
  CHECK(::mkdtemp(path.data()) != nullptr);
  path_ = path;
}
TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}
std::string TempFolder::At(std::string_view name) const {
  return StrCat(path_, "/", name);
}
void TempFolder::Write(std::string_view name, std::string_view bytes) const {
  std::ofstream file(At(name), std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.good());
}
void TempFolder::Remove(std::string_view name) const {
  CHECK(std::filesystem::remove(At(name)));
}

std::string SafetensorsFile(std::string_view header, std::string_view data) {
  return StrCat(Bits(static_cast<uint64_t>(header.size())), header, data);
}

std::string SafetensorsFile(const std::vector<RawTensor>& tensors) {
  OrderedJson header;
  header["__metadata__"]["format"] = "pt";
  std::string data;
  for (const RawTensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.data.size()}}};
    data += tensor.data;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // as the writers in use do
  return SafetensorsFile(text, data);
}

RawTensor& ModelFiles::Tensor(std::string_view name) {
  for (RawTensor& tensor : tensors) {
    if (tensor.name == name) return tensor;
  }
  CHECK(false);
  return tensors[0];
}
void ModelFiles::Drop(std::string_view name) {
  CHECK(std::erase_if(tensors, [&](const RawTensor& tensor) { return tensor.name == name; }) == 1);
}
void ModelFiles::WriteTo(const TempFolder& folder) const {
  folder.Write("config.json", config.dump(2));
  if (!generation.is_null()) folder.Write("generation_config.json", generation.dump(2));
  folder.Write("model.safetensors", SafetensorsFile(tensors));
}
void ModelFiles::WriteShards(const TempFolder& folder, size_t count) const {
  folder.Write("config.json", config.dump(2));
  Json written = {{"metadata", {{"total_size", 1}}}, {"weight_map", Json::object()}};
  const size_t each = (tensors.size() + count - 1) / count;
  for (size_t i = 0; i < count; ++i) {
    const std::string name = StrFormat("model-%05zu-of-%05zu.safetensors", i + 1, count);
    std::vector<RawTensor> part;
    for (size_t j = i * each; j < std::min(tensors.size(), (i + 1) * each); ++j) {
      part.push_back(tensors[j]);
      written["weight_map"][tensors[j].name] = name;
    }
    folder.Write(name, SafetensorsFile(part));
  }
  folder.Write("model.safetensors.index.json", (index.is_null() ? written : index).dump());
}

ModelFiles SmallModel(std::string_view dtype) {
  ModelFiles files;
  files.config = {{"architectures", {"LlamaForCausalLM"}},
                  {"model_type", "llama"},
                  {"vocab_size", 32},
                  {"hidden_size", 16},
                  {"num_hidden_layers", 2},
                  {"num_attention_heads", 4},
                  {"num_key_value_heads", 2},
                  {"intermediate_size", 24},
                  {"max_position_embeddings", 128},
                  {"rms_norm_eps", 1e-5},
                  {"rope_theta", 500000.0},
                  {"hidden_act", "silu"},
                  {"tie_word_embeddings", false},
                  {"eos_token_id", 2},
                  {"bos_token_id", 1}};
  std::mt19937_64 random(7);
  for (const WantedTensor& wanted : WantedTensors(*ParseModelConfig(files.config.dump()))) {
    int64_t elements = 1;
    for (int64_t n : wanted.shape) elements *= n;
    files.tensors.push_back({wanted.name, std::string(dtype), wanted.shape, RandomStored(dtype, elements, &random)});
  }
  return files;
}

GgufWriter& GgufWriter::Raw(std::string_view key, uint32_t type, std::string_view bytes) {
  const std::string value = StrCat(Bits(type), bytes);
  for (auto& [name, old] : metadata_) {
    if (name == key) {
      old = value;
      return *this;
    }
  }
  metadata_.emplace_back(key, value);
  return *this;
}
GgufWriter& GgufWriter::U32(std::string_view key, uint32_t value) {
  return Raw(key, 4, Bits(value));
}
GgufWriter& GgufWriter::F32(std::string_view key, float value) {
  return Raw(key, 6, Bits(value));
}
GgufWriter& GgufWriter::Bool(std::string_view key, bool value) {
  return Raw(key, 7, std::string(1, value ? '\1' : '\0'));
}
GgufWriter& GgufWriter::String(std::string_view key, std::string_view value) {
  return Raw(key, 8, StrCat(Bits(static_cast<uint64_t>(value.size())), value));
}
GgufWriter& GgufWriter::Strings(std::string_view key, const std::vector<std::string>& values) {
  std::string bytes = StrCat(Bits(uint32_t{8}), Bits(static_cast<uint64_t>(values.size())));
  for (const std::string& value : values) bytes += StrCat(Bits(static_cast<uint64_t>(value.size())), value);
  return Raw(key, 9, bytes);
}
GgufWriter& GgufWriter::I32s(std::string_view key, const std::vector<int32_t>& values) {
  std::string bytes = StrCat(Bits(uint32_t{5}), Bits(static_cast<uint64_t>(values.size())));
  for (int32_t value : values) bytes += Bits(value);
  return Raw(key, 9, bytes);
}
GgufWriter& GgufWriter::Erase(std::string_view key) {
  CHECK(std::erase_if(metadata_, [&](const auto& entry) { return entry.first == key; }) == 1);
  return *this;
}
GgufWriter& GgufWriter::Tensor(const RawTensor& tensor) {
  tensors_.push_back(tensor);
  return *this;
}
RawTensor& GgufWriter::tensor(std::string_view name) {
  for (RawTensor& tensor : tensors_) {
    if (tensor.name == name) return tensor;
  }
  CHECK(false);
  return tensors_[0];
}
void GgufWriter::DropTensor(std::string_view name) {
  CHECK(std::erase_if(tensors_, [&](const RawTensor& tensor) { return tensor.name == name; }) == 1);
}

std::string GgufWriter::Bytes(const Overrides& o) const {
  auto count = [](int64_t given, size_t real) {
    return static_cast<uint64_t>(given < 0 ? static_cast<int64_t>(real) : given);
  };
  std::string out = StrCat(o.magic, Bits(version_), Bits(count(o.tensor_count, tensors_.size())),
                           Bits(count(o.metadata_count, metadata_.size())));
  for (const auto& [key, value] : metadata_) out += StrCat(Bits(static_cast<uint64_t>(key.size())), key, value);
  std::string data;
  for (const RawTensor& tensor : tensors_) {
    const bool last = &tensor == &tensors_.back();
    data.append((32 - data.size() % 32) % 32, '\0');
    out += StrCat(Bits(static_cast<uint64_t>(tensor.name.size())), tensor.name,
                  Bits(static_cast<uint32_t>(tensor.shape.size())));
    for (auto n = tensor.shape.rbegin(); n != tensor.shape.rend(); ++n) out += Bits(static_cast<uint64_t>(*n));
    out += Bits(last && o.type >= 0 ? static_cast<uint32_t>(o.type) : FormatOf(tensor.dtype).gguf_type);
    out += Bits(static_cast<uint64_t>(static_cast<int64_t>(data.size()) + (last ? o.shift_offset : 0)));
    data += tensor.data;
  }
  out.append((32 - out.size() % 32) % 32, '\0');
  return out + data;
}

namespace {

GgufWriter MakeSmallGguf(std::string_view dtype) {
  GgufWriter gguf;
  std::vector<std::string> tokens;
  for (int i = 0; i < 64; ++i) tokens.push_back(StrCat("t", i));
  gguf.String("general.architecture", "llama")
      .String("general.name", "small")
      .U32("llama.block_count", 2)
      .U32("llama.context_length", 128)
      .U32("llama.embedding_length", 256)
      .U32("llama.feed_forward_length", 512)
      .U32("llama.attention.head_count", 4)
      .U32("llama.attention.head_count_kv", 2)
      .F32("llama.attention.layer_norm_rms_epsilon", 1e-5f)
      .F32("llama.rope.freq_base", 10000)
      .U32("llama.rope.dimension_count", 64)
      .String("tokenizer.ggml.model", "gpt2")
      .String("tokenizer.ggml.pre", "smollm")
      .Strings("tokenizer.ggml.tokens", tokens)
      .I32s("tokenizer.ggml.token_type", std::vector<int32_t>(64, 1))
      .Strings("tokenizer.ggml.merges", {"t 1"})
      .U32("tokenizer.ggml.bos_token_id", 1)
      .U32("tokenizer.ggml.eos_token_id", 2);
  ModelConfig config;
  config.vocab = 64, config.hidden = 256, config.layers = 2, config.q_heads = 4, config.kv_heads = 2;
  config.head_dim = 64, config.ffn = 512, config.tied_embeddings = true;
  std::mt19937_64 random(11);
  for (const WantedTensor& wanted : WantedTensors(config)) {
    const std::string stored(wanted.shape.size() == 1 ? "F32" : dtype);
    int64_t elements = 1;
    for (int64_t n : wanted.shape) elements *= n;
    gguf.Tensor({GgufTensorName(wanted.name), stored, wanted.shape, RandomStored(stored, elements, &random)});
  }
  return gguf;
}

}  // namespace

GgufWriter SmallGguf(std::string_view dtype) {
  static std::mutex mutex;
  static std::map<std::string, GgufWriter, std::less<>> made;  // guarded by mutex; random numbers take their time
  std::lock_guard lock(mutex);
  auto it = made.find(dtype);
  if (it == made.end()) it = made.emplace(dtype, MakeSmallGguf(dtype)).first;
  return it->second;
}

}  // namespace altiplano

#include "server/model/dequantize.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "server/base/check.h"

namespace altiplano {

namespace {

constexpr std::array<StorageTraits, 8> kTraits = {{
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q8_0", 32, 34},
    {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},
    {"Q4_K", 256, 144},
    {"Q6_K", 256, 210},
}};

// Branch-free so that loops over it vectorise: the exponent is rebased by an exact multiplication, which also makes
// subnormal halves normal; infinities and NaN then get the exponent that they lack.
inline float HalfToFloat(uint16_t half) {
  uint32_t magnitude = (half & 0x7FFFu) << 13;
  uint32_t bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  uint32_t special = (half & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return __builtin_bit_cast(float, bits | special | (half & 0x8000u) << 16);
}

template <typename T>
inline T Load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline float LoadHalf(const uint8_t* at) {
  return HalfToFloat(Load<uint16_t>(at));
}

inline void Store(float x, float* out) {
  *out = x;
}
inline void Store(float x, BF16* out) {
  *out = ToBF16(x);
}

// Formats of one element a block, straight to where they belong.
template <typename Out>
void ConvertPlain(StorageType type, const uint8_t* in, int64_t count, Out* out) {
  switch (type) {
    case StorageType::kF32:
      for (int64_t i = 0; i < count; ++i) Store(Load<float>(in + 4 * i), out + i);
      return;
    case StorageType::kF16:
      for (int64_t i = 0; i < count; ++i) Store(HalfToFloat(Load<uint16_t>(in + 2 * i)), out + i);
      return;
    case StorageType::kBF16:
      for (int64_t i = 0; i < count; ++i) Store(ToFloat(BF16{Load<uint16_t>(in + 2 * i)}), out + i);
      return;
    default:
      CHECK(false);
  }
}

void BlockQ8_0(const uint8_t* in, float* out) {
  const float d = LoadHalf(in);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<int8_t>(in[2 + i]));
}

void BlockQ4_0(const uint8_t* in, float* out) {
  const float d = LoadHalf(in);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((in[2 + i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((in[2 + i] >> 4) - 8);
  }
}

void BlockQ4_1(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), m = LoadHalf(in + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(in[4 + i] & 15) + m;
    out[i + 16] = d * static_cast<float>(in[4 + i] >> 4) + m;
  }
}

// Eight groups of 32, each with a 6-bit scale and a 6-bit minimum. Bytes 0-3 and 4-7 hold the low six bits of the first
// four scales and minima; bytes 8-11 the low nibbles of the last four, whose upper two bits sit atop bytes 0-7.
void BlockQ4K(const uint8_t* in, float* out) {
  const float d = LoadHalf(in), dmin = LoadHalf(in + 2);
  const uint8_t *s = in + 4, *q = in + 16;
  for (int group = 0; group < 8; ++group) {
    int scale, min;
    if (group < 4) {
      scale = s[group] & 63;
      min = s[group + 4] & 63;
    } else {
      scale = (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
      min = (s[group + 4] >> 4) | (s[group] >> 6) << 4;
    }
    const float a = d * static_cast<float>(scale), b = dmin * static_cast<float>(min);
    const uint8_t* nibbles = q + 32 * (group / 2);
    const int shift = 4 * (group % 2);
    for (int i = 0; i < 32; ++i) out[32 * group + i] = a * static_cast<float>((nibbles[i] >> shift) & 15) - b;
  }
}

// Two halves of 128; in each, four runs of 32 share the bytes: low nibbles of runs 0 and 1 (then 2 and 3, the high
// nibbles) in 64 bytes, and the upper two bits of all four in 32 bytes. A scale for every 16 values.
void BlockQ6K(const uint8_t* in, float* out) {
  const float d = LoadHalf(in + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t *low = in + 64 * half, *high = in + 128 + 32 * half, *scales = in + 192 + 8 * half;
    for (int run = 0; run < 4; ++run) {
      for (int i = 0; i < 32; ++i) {
        int q = ((low[32 * (run % 2) + i] >> 4 * (run / 2)) & 15) | ((high[i] >> 2 * run) & 3) << 4;
        float scale = d * static_cast<float>(static_cast<int8_t>(scales[2 * run + i / 16]));
        out[128 * half + 32 * run + i] = scale * static_cast<float>(q - 32);
      }
    }
  }
}

void WidenBlock(StorageType type, const uint8_t* in, float* out) {
  switch (type) {
    case StorageType::kQ8_0:
      return BlockQ8_0(in, out);
    case StorageType::kQ4_0:
      return BlockQ4_0(in, out);
    case StorageType::kQ4_1:
      return BlockQ4_1(in, out);
    case StorageType::kQ4_K:
      return BlockQ4K(in, out);
    case StorageType::kQ6_K:
      return BlockQ6K(in, out);
    default:
      CHECK(false);
  }
}

template <typename Out>
void ConvertBlocks(StorageType type, const uint8_t* blocks, int64_t skip, int64_t count, Out* out) {
  const StorageTraits& traits = Traits(type);
  float values[256];
  while (count > 0) {
    WidenBlock(type, blocks, values);
    int64_t n = std::min(count, traits.block_elements - skip);
    for (int64_t i = 0; i < n; ++i) Store(values[skip + i], out + i);
    blocks += traits.block_bytes;
    out += n;
    count -= n;
    skip = 0;
  }
}

template <typename Out>
void ConvertTo(StorageType type, const uint8_t* blocks, int64_t skip, int64_t count, Out* out) {
  if (Traits(type).block_elements == 1) {
    ConvertPlain(type, blocks, count, out);
  } else {
    ConvertBlocks(type, blocks, skip, count, out);
  }
}

}  // namespace

const StorageTraits& Traits(StorageType type) {
  return kTraits[static_cast<size_t>(type)];
}

void Convert(StorageType type, const uint8_t* blocks, int64_t skip, int64_t count, DType dtype, void* out) {
  CHECK(skip >= 0 && skip < Traits(type).block_elements);
  if (dtype == DType::kF32) return ConvertTo(type, blocks, skip, count, static_cast<float*>(out));
  CHECK(dtype == DType::kBF16);
  ConvertTo(type, blocks, skip, count, static_cast<BF16*>(out));
}

}  // namespace altiplano

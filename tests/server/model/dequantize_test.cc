#include "server/model/dequantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/checkpoint_tensors.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

const char* const kAll[] = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"};

std::vector<float> Widen(StorageType type, std::string_view bytes, int64_t skip, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  Convert(type, reinterpret_cast<const uint8_t*>(bytes.data()), skip, count, DType::kF32, values.data());
  return values;
}

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

TEST(Dequantize, EveryFormatWidensToWhatItsDescriptionSays) {
  std::mt19937_64 random(1);
  for (const char* dtype : kAll) {
    SCOPED_TRACE(dtype);
    const StorageType type = *StorageTypeNamed(dtype);
    const int64_t n = 8 * 256;
    const std::string bytes = RandomStored(dtype, n, &random);
    const std::vector<float> values = Widen(type, bytes, 0, n);
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(static_cast<double>(values[static_cast<size_t>(i)]), DecodeOne(dtype, bytes, i)) << "element " << i;
    }
  }
}

// Values from the Python package gguf 0.19: two blocks of a published model for the types that it uses, random bytes
// for the others. Bit for bit: the same f32 arithmetic.
TEST(Dequantize, EqualsTheReferenceImplementation) {
  std::ifstream file(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/server/model/dequantize_vectors.json"));
  std::stringstream text;
  text << file.rdbuf();
  auto vectors = ParseJson(text.str());
  ASSERT_TRUE(vectors.ok()) << vectors.status().ToString();
  ASSERT_EQ(vectors->size(), 7u);
  for (const Json& vector : *vectors) {
    SCOPED_TRACE(vector["type"].get<std::string>() + " of " + vector["source"].get<std::string>());
    const StorageType type = *StorageTypeNamed(vector["type"].get<std::string>());
    const std::string blocks = FromHex(vector["blocks"]), expected = FromHex(vector["values"]);
    const auto n = static_cast<int64_t>(blocks.size()) / Traits(type).block_bytes * Traits(type).block_elements;
    ASSERT_EQ(expected.size(), static_cast<size_t>(n) * sizeof(float));
    const std::vector<float> values = Widen(type, blocks, 0, n);
    EXPECT_EQ(std::memcmp(values.data(), expected.data(), expected.size()), 0);
  }
}

TEST(Dequantize, StartsAndEndsInsideBlocks) {
  std::mt19937_64 random(2);
  for (const char* dtype : kAll) {
    SCOPED_TRACE(dtype);
    const StorageType type = *StorageTypeNamed(dtype);
    const StorageTraits& traits = Traits(type);
    const std::string bytes = RandomStored(dtype, 1024, &random);
    for (int trial = 0; trial < 50; ++trial) {
      const int64_t begin = static_cast<int64_t>(random() % 1024),
                    count = static_cast<int64_t>(random() % static_cast<uint64_t>(1025 - begin));
      const int64_t block = begin / traits.block_elements;
      const std::string_view from = std::string_view(bytes).substr(static_cast<size_t>(block * traits.block_bytes));
      const std::vector<float> values = Widen(type, from, begin % traits.block_elements, count);
      for (int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(static_cast<double>(values[static_cast<size_t>(i)]), DecodeOne(dtype, bytes, begin + i));
      }
    }
  }
}

TEST(Dequantize, EveryHalf) {
  std::string bytes;
  for (int half = 0; half < 65536; ++half) {
    bytes.push_back(static_cast<char>(half & 255));
    bytes.push_back(static_cast<char>(half >> 8));
  }
  const std::vector<float> values = Widen(StorageType::kF16, bytes, 0, 65536);
  for (int half = 0; half < 65536; ++half) {
    const float expected = HalfValue(static_cast<uint16_t>(half)), value = values[static_cast<size_t>(half)];
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << half;
    } else {
      ASSERT_EQ(std::memcmp(&value, &expected, sizeof value), 0) << half << ": " << value << " is not " << expected;
    }
  }
}

TEST(Dequantize, RoundsToTheNearestBF16) {
  std::vector<float> values = {0.0f,    -0.0f,         1.0f,     1.00390625f, 1.01171875f, 1e-40f,
                               -1e-45f, 3.3895314e38f, INFINITY, -INFINITY,   NAN};
  std::mt19937_64 random(3);
  for (int i = 0; i < 20000; ++i) {
    uint32_t bits = static_cast<uint32_t>(random());
    if (i % 3 == 0) bits = (bits & 0xFFFF0000u) | 0x8000u;  // halfway
    float value;
    std::memcpy(&value, &bits, sizeof value);
    if (std::isfinite(value)) values.push_back(value);
  }
  std::vector<uint16_t> rounded(values.size());
  Convert(StorageType::kF32, reinterpret_cast<const uint8_t*>(values.data()), 0, static_cast<int64_t>(values.size()),
          DType::kBF16, rounded.data());
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) {
      EXPECT_TRUE(std::isnan(ToFloat(BF16{rounded[i]})));
    } else if (std::isinf(values[i])) {
      EXPECT_EQ(ToFloat(BF16{rounded[i]}), values[i]);
    } else {
      ASSERT_EQ(rounded[i], NearestBF16(static_cast<double>(values[i]))) << values[i];
    }
  }
}

}  // namespace
}  // namespace altiplano

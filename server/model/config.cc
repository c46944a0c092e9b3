#include "server/model/config.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numbers>

#include "kernels/ops.h"
#include "server/base/strings.h"

namespace altiplano {

namespace {

constexpr int64_t kMaxSize = INT32_MAX;
constexpr int64_t kMaxLayers = 10'000;  // bounds the list of tensors that a config can ask for

// Elements of all tensors; nullopt when they overflow.
std::optional<uint64_t> CountParameters(const ModelConfig& c) {
  bool overflow = false;
  auto mul = [&](uint64_t a, uint64_t b) {
    uint64_t product;
    overflow |= __builtin_mul_overflow(a, b, &product);
    return product;
  };
  auto add = [&](uint64_t a, uint64_t b) {
    uint64_t sum;
    overflow |= __builtin_add_overflow(a, b, &sum);
    return sum;
  };
  auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  uint64_t attention = mul(size(c.hidden), add(mul(2, size(c.q_size())), mul(2, size(c.kv_size()))));
  uint64_t ffn = mul(3, mul(size(c.hidden), size(c.ffn)));
  uint64_t layer = add(add(attention, ffn), mul(2, size(c.hidden)));
  uint64_t embedding = mul(size(c.vocab), size(c.hidden));
  uint64_t outer = add(mul(embedding, c.tied_embeddings ? 1 : 2), size(c.hidden));
  uint64_t total = add(mul(layer, size(c.layers)), outer);
  if (overflow) return std::nullopt;
  return total;
}

Status CheckRope(const ModelConfig& c) {
  const RopeScaling& r = c.rope_scaling;
  if (!std::isfinite(c.rope_theta) || c.rope_theta < 1) {
    return InvalidArgument(StrCat("rope_theta is ", c.rope_theta, ", expected a finite number of at least 1"));
  }
  if (r.type == RopeScaling::Type::kLinear || r.type == RopeScaling::Type::kLlama3) {
    if (!std::isfinite(r.factor) || r.factor < 1) {
      return InvalidArgument(StrCat("RoPE scaling factor is ", r.factor, ", expected a finite number of at least 1"));
    }
  }
  if (r.type == RopeScaling::Type::kLlama3) {
    if (!std::isfinite(r.low_freq_factor) || r.low_freq_factor <= 0) {
      return InvalidArgument(StrCat("RoPE low_freq_factor is ", r.low_freq_factor, ", expected a positive number"));
    }
    if (!std::isfinite(r.high_freq_factor) || r.high_freq_factor <= r.low_freq_factor) {
      return InvalidArgument(StrCat("RoPE high_freq_factor is ", r.high_freq_factor,
                                    ", expected more than low_freq_factor, which is ", r.low_freq_factor));
    }
    if (r.original_max_position <= 0 || r.original_max_position > kMaxSize) {
      return InvalidArgument(
          StrCat("RoPE original_max_position_embeddings is ", r.original_max_position, ", expected 1 to ", kMaxSize));
    }
  }
  if (r.type == RopeScaling::Type::kFactors) {
    if (static_cast<int64_t>(r.factors.size()) != c.head_dim / 2) {
      return InvalidArgument(
          StrCat("there are ", r.factors.size(), " RoPE factors, expected head_dim / 2 = ", c.head_dim / 2));
    }
    for (size_t i = 0; i < r.factors.size(); ++i) {
      if (!std::isfinite(r.factors[i]) || r.factors[i] <= 0) {
        return InvalidArgument(StrCat("RoPE factor ", i, " is ", r.factors[i], ", expected a positive number"));
      }
    }
  }
  return OkStatus();
}

}  // namespace

uint64_t ModelConfig::parameters() const {
  return CountParameters(*this).value_or(0);
}

Status CheckModelConfig(const ModelConfig& c) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"vocabulary size", c.vocab},       {"hidden size", c.hidden}, {"number of query heads", c.q_heads},
      {"number of KV heads", c.kv_heads}, {"head_dim", c.head_dim},  {"ffn size", c.ffn},
      {"context length", c.max_position},
  };
  for (const auto& [what, n] : sizes) {
    if (n < 1 || n > kMaxSize) return InvalidArgument(StrCat(what, " is ", n, ", expected 1 to ", kMaxSize));
  }
  if (c.layers < 1 || c.layers > kMaxLayers) {
    return InvalidArgument(StrCat("number of layers is ", c.layers, ", expected 1 to ", kMaxLayers));
  }
  if (c.q_heads % c.kv_heads != 0) {
    return InvalidArgument(StrCat(c.q_heads, " query heads cannot be shared out to ", c.kv_heads,
                                  " KV heads: expected a divisor of ", c.q_heads));
  }
  if (c.head_dim % 2 != 0)
    return InvalidArgument(StrCat("head_dim is ", c.head_dim, ", expected an even number (RoPE turns pairs)"));
  // An epsilon that is zero as a float would make NaN of a row of zeros.
  if (!std::isfinite(c.rms_eps) || c.rms_eps < 1e-30f || c.rms_eps >= 1) {
    return InvalidArgument(StrCat("RMS norm epsilon is ", c.rms_eps, ", expected a positive number below 1"));
  }
  constexpr uint64_t kMaxElements = uint64_t{1} << 56;  // leaves room for bytes and alignment
  std::optional<uint64_t> parameters = CountParameters(c);
  if (!parameters || *parameters > kMaxElements) {
    return InvalidArgument(StrCat("vocabulary ", c.vocab, ", hidden size ", c.hidden, ", ", c.layers, " layers, ",
                                  c.q_heads, " heads of ", c.head_dim, " and ffn ", c.ffn,
                                  " make more than 2^56 parameters"));
  }
  uint64_t kv_elements;
  if (__builtin_mul_overflow(static_cast<uint64_t>(c.kv_size()), static_cast<uint64_t>(c.layers), &kv_elements) ||
      __builtin_mul_overflow(kv_elements, static_cast<uint64_t>(c.max_position), &kv_elements) ||
      kv_elements > kMaxElements) {
    return InvalidArgument(StrCat(c.layers, " layers of ", c.kv_heads, " KV heads of ", c.head_dim,
                                  " and context length ", c.max_position,
                                  " make a KV cache of more than 2^56 elements"));
  }
  if (c.vocab > kMostVocabulary) {
    return InvalidArgument(StrCat("vocabulary size is ", c.vocab, ", expected at most ", kMostVocabulary));
  }
  return CheckRope(c);
}

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  const RopeScaling& r = config.rope_scaling;
  std::vector<float> frequencies(static_cast<size_t>(config.head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double f = std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    switch (r.type) {
      case RopeScaling::Type::kNone:
        break;
      case RopeScaling::Type::kLinear:
        f /= r.factor;
        break;
      case RopeScaling::Type::kFactors:
        f /= static_cast<double>(r.factors[i]);
        break;
      case RopeScaling::Type::kLlama3: {
        const double wavelength = 2 * std::numbers::pi / f;
        const double original = static_cast<double>(r.original_max_position);
        if (wavelength > original / r.low_freq_factor) {
          f /= r.factor;
        } else if (wavelength >= original / r.high_freq_factor) {
          const double smooth = (original / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
          f = (1 - smooth) * f / r.factor + smooth * f;
        }
        break;
      }
    }
    frequencies[i] = static_cast<float>(f);
  }
  return frequencies;
}

std::optional<ModelConfig> PublishedModelConfig(std::string_view name) {
  struct Sizes {
    std::string_view name;
    int64_t hidden, layers, q_heads, head_dim, ffn;
    bool tied;
  };
  static constexpr Sizes kPublished[] = {{"1b", 2048, 16, 32, 64, 8192, true},
                                         {"3b", 3072, 28, 24, 128, 8192, true},
                                         {"8b", 4096, 32, 32, 128, 14336, false},
                                         {"70b", 8192, 80, 64, 128, 28672, false},
                                         {"405b", 16384, 126, 128, 128, 53248, false}};
  const auto* sizes = std::ranges::find(kPublished, name, &Sizes::name);
  if (sizes == std::end(kPublished)) return std::nullopt;
  ModelConfig config;
  config.hidden = sizes->hidden;
  config.layers = sizes->layers;
  config.q_heads = sizes->q_heads;
  config.head_dim = sizes->head_dim;
  config.ffn = sizes->ffn;
  config.tied_embeddings = sizes->tied;
  config.name = name;
  config.architecture = "LlamaForCausalLM";
  config.vocab = 128256;
  config.kv_heads = 8;
  config.max_position = 131072;
  config.rope_theta = 500000;
  config.rope_scaling.type = RopeScaling::Type::kLlama3;
  config.rope_scaling.factor = config.tied_embeddings ? 32 : 8;
  config.rope_scaling.low_freq_factor = 1;
  config.rope_scaling.high_freq_factor = 4;
  config.rope_scaling.original_max_position = 8192;
  return config;
}

}  // namespace altiplano

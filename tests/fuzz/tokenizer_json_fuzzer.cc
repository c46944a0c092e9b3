// Any bytes as a tokenizer.json.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tests/fuzz/tokenizer_properties.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  const auto made = Tokenizer::FromHuggingFace(std::string_view(reinterpret_cast<const char*>(data), size));
  if (made.ok()) {
    CheckTokenizer(**made);
  } else {
    CheckRefusal(made.status());
  }
  return 0;
}

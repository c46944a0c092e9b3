// Any bytes as a tokenizer.model, alone and after the lines that every such file begins with: the 256 single bytes.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/base/strings.h"
#include "tests/fuzz/tokenizer_properties.h"

namespace altiplano {
namespace {

std::string SingleBytes() {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string lines;
  for (size_t b = 0; b < 256; ++b) lines += StrCat(kDigits[b >> 2], kDigits[(b & 3) << 4], "== ", b, "\n");
  return lines;
}

void Load(std::string_view file) {
  const auto made = Tokenizer::FromTiktoken(file);
  if (!made.ok()) return CheckRefusal(made.status());
  CheckTokenizer(**made);
  CHECK((*made)->bos() == (*made)->Special("<|begin_of_text|>"));
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string single_bytes = altiplano::SingleBytes();
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  altiplano::Load(input);
  altiplano::Load(altiplano::StrCat(single_bytes, input));
  return 0;
}

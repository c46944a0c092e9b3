// Load-test datasets from bytes: the first one says which kind. What is read can be sent.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/base/check.h"
#include "server/bench/dataset.h"
#include "server/bench/machine.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace altiplano;
  using namespace altiplano::bench;
  if (size == 0) return 0;
  const std::string_view contents(reinterpret_cast<const char*>(data) + 1, size - 1);
  (void)ParseMachine(contents);
  constexpr const char* kNames[] = {"sharegpt", "azure", "mooncake", "lengths"};
  DatasetOptions options;
  options.name = kNames[data[0] % 4];
  options.length_scale = data[0] < 128 ? 1 : 0.25;
  options.max_tokens = 1 << 16;
  const Vocabulary vocabulary = {.size = 100, .excluded = {3}};
  auto dataset = ParseDataset(options, contents, [](const std::string& text) -> StatusOr<std::vector<TokenId>> {
    return std::vector<TokenId>(text.size(), 1);
  });
  if (!dataset.ok()) return 0;
  CHECK(!dataset->requests.empty() && dataset->requests.size() <= 100);
  Duration last{};
  for (const LoadRequest& request : dataset->requests) {
    CHECK(request.output_tokens >= 1 && request.arrival >= last);
    last = request.arrival;
    const std::vector<TokenId> prompt = PromptOf(request, vocabulary);
    CHECK(!prompt.empty() && static_cast<int32_t>(prompt.size()) == request.input_tokens);
    for (TokenId id : prompt) CHECK(id >= 0 && id < vocabulary.size);
  }
  return 0;
}

// Any bytes as JSON: the three readers agree on what is valid, what is read prints and reads back as the same, nothing
// is nested deeper than allowed, and errors are short and printable whatever the text holds.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/text/python_json.h"
#include "server/text/tokenizer_json.h"

namespace altiplano {
namespace {

template <typename J>
int Depth(const J& value) {
  int deepest = 0;
  for (const J& child : value) {
    if (value.is_structured()) deepest = std::max(deepest, Depth(child));
  }
  return deepest + (value.is_structured() ? 1 : 0);
}

void CheckError(const Status& status) {
  CHECK(status.code() == Code::kInvalidArgument);
  CHECK(status.message().starts_with("not valid JSON: ") && status.message().size() <= 400);
  CHECK(IsValidUtf8(status.message()));
}

void ReadAll(std::string_view text) {
  const StatusOr<OrderedJson> ordered = ParseOrderedJson(text);
  const StatusOr<Json> sorted = ParseJson(text);
  const StatusOr<PyValue> python = ParsePyJson(text, kMaxJsonDepth);
  CHECK(sorted.ok() == ordered.ok() && python.ok() == ordered.ok());
  const StatusOr<Json> shallow = ParseJson(text, 3);
  if (!ordered.ok()) {
    CheckError(ordered.status());
    CheckError(sorted.status());
    CheckError(python.status());
    CHECK(!shallow.ok());
    return;
  }
  CHECK(IsValidUtf8(text));
  CHECK(Depth(*ordered) <= kMaxJsonDepth);
  CHECK(shallow.ok() == (Depth(*ordered) <= 3));
  CHECK(ParseOrderedJson(ordered->dump()).value() == *ordered);

  std::string printed;
  AppendPyJson(*python, &printed);
  CHECK(ParseJson(printed).value() == *sorted);

  JsonCursor cursor(text);
  std::string_view span;
  CHECK(cursor.SkipValue(&span) && cursor.ExpectEnd());
  CHECK(ParseJson(span).value() == *sorted);
}

}  // namespace
}  // namespace altiplano

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  altiplano::ReadAll(std::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}

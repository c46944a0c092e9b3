#include "server/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "server/base/strings.h"
#include "tests/server/model/checkpoint_testlib.h"

namespace altiplano {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

StatusOr<std::vector<SafetensorsTensor>> Parse(std::string_view bytes) {
  return ReadSafetensorsHeader(MemoryReader("x.safetensors", bytes));
}

TEST(Safetensors, GivesTensorsByOffset) {
  auto tensors = Parse(SafetensorsFile(
      R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},"__metadata__":{"format":"pt","x":"y"},)"
      R"("a":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]},"empty":{"dtype":"I64","shape":[0,4],"data_offsets":[14,14]},)"
      R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[14,15]}}   )",
      std::string(15, 'x')));
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  ASSERT_EQ(tensors->size(), 4u);
  const SafetensorsTensor &a = (*tensors)[0], &b = (*tensors)[1];
  EXPECT_EQ(a.name, "a");
  EXPECT_EQ(a.dtype, "BF16");
  EXPECT_THAT(a.shape, ElementsAre(1, 3));
  EXPECT_EQ(a.end - a.begin, 6u);
  EXPECT_EQ(b.name, "b");
  EXPECT_EQ(b.begin, a.end);
  EXPECT_EQ((*tensors)[2].name, "empty");
  EXPECT_EQ((*tensors)[3].name, "scalar");
}

TEST(Safetensors, NoTensorsAtAll) {
  auto tensors = Parse(SafetensorsFile("{}", ""));
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  EXPECT_TRUE(tensors->empty());
}

struct Refusal {
  const char* name;
  std::string file;
  Code code;
  std::vector<const char*> says;
};

std::string One(std::string_view body, size_t data = 8) {
  return SafetensorsFile(StrCat(R"({"w":)", body, "}"), std::string(data, '\0'));
}
std::string Two(std::string_view a, std::string_view b, size_t data) {
  return SafetensorsFile(StrCat(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)", a,
                                R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)", b, "}}"),
                         std::string(data, '\0'));
}

class SafetensorsRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(SafetensorsRefuses, InOnePreciseSentence) {
  Status status = Parse(GetParam().file).status();
  EXPECT_EQ(status.code(), GetParam().code) << status.ToString();
  EXPECT_THAT(status.message(), ::testing::StartsWith("x.safetensors: "));
  for (const char* part : GetParam().says) EXPECT_THAT(status.message(), HasSubstr(part));
}

constexpr Code kBad = Code::kInvalidArgument, kShort = Code::kDataLoss;
INSTANTIATE_TEST_SUITE_P(
    Table, SafetensorsRefuses,
    ::testing::Values(
        Refusal{"empty", "", kShort, {"has 0 bytes"}},
        Refusal{"seven_bytes", "1234567", kShort, {"has 7 bytes", "truncated"}},
        Refusal{"header_past_the_end", std::string("\x64\0\0\0\0\0\0\0{}", 10), kShort, {"claims 100 bytes", "only 2"}},
        Refusal{"header_over_100_MB",
                std::string("\1\xE1\xF5\5\0\0\0\0{}", 10),
                kBad,
                {"claims 100000001 bytes", "100000000"}},
        Refusal{"header_of_all_ones", std::string(16, '\xFF'), kBad, {"claims 18446744073709551615 bytes"}},
        Refusal{"header_of_nothing", std::string(8, '\0'), kBad, {"does not start with '{'"}},
        Refusal{"header_is_an_array", SafetensorsFile("[]", ""), kBad, {"does not start with '{'"}},
        Refusal{"header_cut", SafetensorsFile(R"({"w":{"dtype":"F32")", ""), kBad, {"not valid JSON", "byte 20"}},
        Refusal{"trailing_text", SafetensorsFile("{}{}", ""), kBad, {"not valid JSON"}},
        Refusal{"bad_utf8", SafetensorsFile("{\"\xFF\":1}", ""), kBad, {"not valid JSON", "\\xff"}},
        Refusal{"nul", SafetensorsFile(std::string("{}\0x", 4), ""), kBad, {"header is not valid JSON", "NUL"}},
        Refusal{"tensor_is_a_number", One("1"), kBad, {"tensor w: is the number 1, expected an object"}},
        Refusal{"tensor_is_null", One("null"), kBad, {"tensor w: is null, expected an object"}},
        Refusal{"metadata_number",
                SafetensorsFile(R"({"__metadata__":{"a":1}})", ""),
                kBad,
                {"__metadata__", "the number 1", "strings"}},
        Refusal{"no_dtype", One(R"({"shape":[2],"data_offsets":[0,8]})"), kBad, {"tensor w: has no dtype"}},
        Refusal{"no_shape", One(R"({"dtype":"F32","data_offsets":[0,8]})"), kBad, {"tensor w: has no shape"}},
        Refusal{"no_offsets", One(R"({"dtype":"F32","shape":[2]})"), kBad, {"tensor w: has no data_offsets"}},
        Refusal{"unknown_field", One(R"({"dtype":"F32","stride":[2]})"), kBad, {"tensor w: unknown field \"stride\""}},
        Refusal{"dtype_twice", One(R"({"dtype":"F32","dtype":"F32"})"), kBad, {"tensor w: dtype appears twice"}},
        Refusal{"dtype_number", One(R"({"dtype":3})"), kBad, {"tensor w: dtype is the number 3"}},
        Refusal{"dtype_unknown",
                One(R"({"dtype":"F31","shape":[2],"data_offsets":[0,8]})"),
                kBad,
                {"tensor w: unknown dtype \"F31\""}},
        Refusal{"shape_string", One(R"({"dtype":"F32","shape":"2"})"), kBad, {"tensor w: shape is a string"}},
        Refusal{"shape_negative", One(R"({"dtype":"F32","shape":[-2]})"), kBad, {"tensor w: shape has the number -2"}},
        Refusal{
            "shape_fraction", One(R"({"dtype":"F32","shape":[2.5]})"), kBad, {"tensor w: shape has the number 2.5"}},
        Refusal{"shape_nested", One(R"({"dtype":"F32","shape":[[2]]})"), kBad, {"tensor w: shape has an array"}},
        Refusal{"shape_huge",
                One(R"({"dtype":"F32","shape":[9223372036854775808]})"),
                kBad,
                {"tensor w: dimension 9223372036854775808"}},
        Refusal{"shape_rank",
                One(R"({"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]})"),
                kBad,
                {"more than 8 dimensions"}},
        Refusal{"shape_overflow",
                One(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"),
                kBad,
                {"tensor w", "overflows 64 bits"}},
        Refusal{"offsets_one", One(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), kBad, {"fewer than two"}},
        Refusal{"offsets_three", One(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})"), kBad, {"more than two"}},
        Refusal{"offsets_backwards",
                One(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"),
                kBad,
                {"tensor w", "run backwards"}},
        Refusal{"offsets_out_of_range",
                One(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})"),
                kShort,
                {"tensor w", "end at 16", "holds 8 bytes"}},
        Refusal{"offsets_not_the_size",
                One(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
                kBad,
                {"tensor w", "span 8 bytes, expected 12 for F32 [3]"}},
        Refusal{"bytes_after",
                One(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 9),
                kBad,
                {"1 bytes after the last tensor"}},
        Refusal{"gap_before", Two("[1,5]", "[5,9]", 9), kBad, {"tensor a: begins at 1, leaving a gap after the start"}},
        Refusal{"gap_between",
                Two("[0,4]", "[5,9]", 9),
                kBad,
                {"tensor b: begins at 5, leaving a gap after the end of a at 4"}},
        Refusal{"overlap", Two("[0,4]", "[3,7]", 7), kBad, {"tensor b: overlaps a: begins at 3"}},
        Refusal{"same_bytes", Two("[0,4]", "[0,4]", 4), kBad, {"overlaps"}},
        Refusal{
            "name_twice",
            SafetensorsFile(
                R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                ""),
            kBad,
            {"tensor a: the name appears twice"}},
        Refusal{
            "name_long", SafetensorsFile(StrCat("{\"", std::string(5000, 'n'), "\":1}"), ""), kBad, {"5000 bytes"}}),
    [](const auto& param) { return param.param.name; });

TEST(Safetensors, DepthCostsNothing) {
  std::string deep = SafetensorsFile(StrCat(R"({"a":)", std::string(1 << 20, '['), "}"), "");
  EXPECT_EQ(Parse(deep).status().code(), Code::kInvalidArgument);
}

// Cut anywhere, a file is an error.
TEST(Safetensors, EveryTruncationIsAnError) {
  const std::string whole = SafetensorsFile({{"a", "F32", {2, 3}, std::string(24, 'a')}, {"b", "BF16", {2}, "bbbb"}});
  ASSERT_TRUE(Parse(whole).ok());
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_FALSE(Parse(std::string_view(whole).substr(0, n)).ok()) << n;
}

}  // namespace
}  // namespace altiplano

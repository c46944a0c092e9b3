#include "server/text/python_json.h"

#include <gtest/gtest.h>

#include <limits>

#include "server/base/strings.h"

namespace altiplano {
namespace {

std::string Dumps(std::string_view json) {
  std::string out;
  AppendPyJson(ParsePyJson(json).value(), &out);
  return out;
}
std::string Indented(std::string_view json, int indent) {
  std::string out;
  AppendPyJsonIndented(ParsePyJson(json).value(), indent, &out);
  return out;
}
std::string Str(std::string_view json) {
  std::string out;
  AppendPyStr(ParsePyJson(json).value(), &out);
  return out;
}
std::string Float(double number) {
  std::string out;
  AppendPyFloat(number, &out);
  return out;
}

// Expectations are what CPython 3.11 prints.
TEST(PythonJsonTest, DumpsOnOneLine) {
  EXPECT_EQ(Dumps(R"({"b":1,"a":[true,false,null,{}],"c":{"d":[]}})"),
            R"({"b": 1, "a": [true, false, null, {}], "c": {"d": []}})");
  EXPECT_EQ(Dumps(R"(["é","\u00e9","\ud83d\ude80","</>&'"])"), R"(["é", "é", "🚀", "</>&'"])");
  EXPECT_EQ(Dumps(R"("\"\\\/\b\f\n\r\t\u0000\u001f\u007f\u2028")"),
            "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\x7f\u2028\"");
}

TEST(PythonJsonTest, DumpsIndented) {
  EXPECT_EQ(Indented(R"({"a":[1,{"b":2}],"c":{},"d":[]})", 4),
            "{\n    \"a\": [\n        1,\n        {\n            \"b\": 2\n        }\n    ],\n    \"c\": {},\n    "
            "\"d\": []\n}");
  EXPECT_EQ(Indented("[1]", 0), "[\n1\n]");
  EXPECT_EQ(Indented("7", 2), "7");
}

TEST(PythonJsonTest, KeepsNumbers) {
  EXPECT_EQ(Dumps("[1, 1.0, -0, -0.0, 1E5, 1e-5, 12345678901234567890, -9223372036854775808]"),
            "[1, 1.0, 0, -0.0, 100000.0, 1e-05, 12345678901234567890, -9223372036854775808]");
  const std::string big = "-123456789012345678901234567890123456789012345678901234567890";
  EXPECT_EQ(Dumps(big), big);
}

TEST(PythonJsonTest, PrintsFloatsAsRepr) {
  EXPECT_EQ(Float(0.1), "0.1");
  EXPECT_EQ(Float(-2.5), "-2.5");
  EXPECT_EQ(Float(100), "100.0");
  EXPECT_EQ(Float(0.0001), "0.0001");
  EXPECT_EQ(Float(0.00001234), "1.234e-05");
  EXPECT_EQ(Float(1e15), "1000000000000000.0");
  EXPECT_EQ(Float(9999999999999998), "9999999999999998.0");
  EXPECT_EQ(Float(1e16), "1e+16");
  EXPECT_EQ(Float(123456789012345680), "1.2345678901234568e+17");
  EXPECT_EQ(Float(1.0 / 3), "0.3333333333333333");
  EXPECT_EQ(Float(std::numeric_limits<double>::max()), "1.7976931348623157e+308");
  EXPECT_EQ(Float(std::numeric_limits<double>::denorm_min()), "5e-324");
}

TEST(PythonJsonTest, PrintsValuesAsStr) {
  EXPECT_EQ(Str(R"("it's")"), "it's");
  EXPECT_EQ(Str(R"([1, 1.0, true, false, null, "a", {"k": "v"}])"), "[1, 1.0, True, False, None, 'a', {'k': 'v'}]");
  EXPECT_EQ(Str(R"(["it's", "say \"it's\"", "\n\t\r\\", "\u0000\u007f\u00a0\u200d\ufeff", "é🚀"])"),
            R"(["it's", 'say "it\'s"', '\n\t\r\\', '\x00\x7f\xa0\u200d\ufeff', 'é🚀'])");
  EXPECT_EQ(Str("[\"\xF3\xA0\x80\xA1\"]"), R"(['\U000e0021'])");
}

TEST(PythonJsonTest, RefusesWhatParseJsonRefuses) {
  for (const std::string_view bad : {"", "{", "[1,]", "{'a': 1}", "nan", "1e999", "{\"a\": 1, \"a\": 2}", "[] []",
                                     "\"\xff\"", "\"\\ud800\"", "007", "1_000"}) {
    EXPECT_EQ(ParsePyJson(bad).status().code(), Code::kInvalidArgument) << bad;
  }
  EXPECT_NE(ParsePyJson("\"\xff\"").status().message().find("\\xff"), std::string::npos);
  EXPECT_EQ(ParsePyJson({"1\0x", 3}).status().code(), Code::kInvalidArgument);
  const auto deep = ParsePyJson("[[[[1]]]]", 3);
  EXPECT_EQ(deep.status().code(), Code::kInvalidArgument);
  EXPECT_NE(deep.status().message().find("nested deeper than 3"), std::string::npos) << deep.status().ToString();
  EXPECT_TRUE(ParsePyJson("[[[1]]]", 3).ok());
}

TEST(PythonJsonTest, StripsAsPython) {
  EXPECT_EQ(PyStrip(" \t\n\r\v\f\x1c\x1f\u0085\u00a0\u1680\u2003\u2028\u3000 a b \u3000\x1d"), "a b");
  EXPECT_EQ(PyStrip("\u200ba\ufeff"), "\u200ba\ufeff");  // no white space
  EXPECT_EQ(PyStrip(" \n "), "");
  EXPECT_EQ(PyStrip(""), "");
  EXPECT_EQ(PyStrip("é"), "é");
}

}  // namespace
}  // namespace altiplano

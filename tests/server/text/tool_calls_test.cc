#include "server/text/tool_calls.h"

#include <gtest/gtest.h>

#include "server/base/strings.h"
#include "server/text/python_json.h"
#include "tests/server/text/chat_testlib.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano::testing {
namespace {

// "f{"a": 1};g{}", or "" for text.
std::string Show(const std::vector<ToolCall>& calls) {
  std::string shown;
  for (const ToolCall& call : calls) shown += StrCat(shown.empty() ? "" : ";", call.name, call.arguments_json);
  return shown;
}
std::string Llama(std::string_view answer) {
  return Show(ParseToolCalls(answer, ToolDialect::kLlama));
}
std::string Pythonic(std::string_view answer) {
  return Show(ParseToolCalls(answer, ToolDialect::kPythonic));
}

TEST(ToolCallsTest, AgreesWithTheVectors) {
  const auto rows = ReadPyJsonLines(DataPath("tools/tool_call_parse_vectors.jsonl"));
  if (rows.empty()) GTEST_SKIP() << "no shared test data";
  EXPECT_EQ(rows.size(), 33u);
  for (const PyValue& row : rows) {
    SCOPED_TRACE(TextOf(row, "id"));
    std::string expected;
    for (const PyValue& call : row.Find("calls")->items) {
      expected += StrCat(expected.empty() ? "" : ";", TextOf(call, "name"));
      AppendPyJson(*call.Find("arguments"), &expected);
    }
    EXPECT_EQ(Llama(TextOf(row, "output")), expected);
    if (TextOf(row, "format") == "pythonic") {
      EXPECT_EQ(Pythonic(TextOf(row, "output")), expected);
    }
  }
}

TEST(ToolCallsTest, ReadsJson) {
  EXPECT_EQ(Llama(R"({"name": "f", "parameters": {"a": 1}})"), R"(f{"a": 1})");
  EXPECT_EQ(Llama(R"( {"name":"f","arguments":{"b":2,"a":[1.0,null]}} <|eot_id|>)"), R"(f{"b": 2, "a": [1.0, null]})");
  EXPECT_EQ(Llama(R"({"type": "function", "name": "f", "parameters": {}})"), "f{}");
  EXPECT_EQ(Llama(R"(Sure: {"name": "f", "parameters": {}}; {"name": "g", "parameters": {"s": "}{\""}} done)"),
            R"(f{};g{"s": "}{\""})");
  EXPECT_EQ(Llama(R"([{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}])"), "f{};g{}");
  EXPECT_EQ(Llama(R"({"name": "f", "parameters": {"big": 123456789012345678901234567890, "x": 1e2}})"),
            R"(f{"big": 123456789012345678901234567890, "x": 100.0})");
}

TEST(ToolCallsTest, LeavesTextAlone) {
  for (const std::string_view text : {"",
                                      "  ",
                                      "Paris.",
                                      "{",
                                      "}{",
                                      "{}",
                                      R"({"name": "f"})",
                                      R"({"parameters": {}})",
                                      R"({"name": 1, "parameters": {}})",
                                      R"({"name": "", "parameters": {}})",
                                      R"({"name": "f", "parameters": []})",
                                      R"({"name": "f", "parameters": "{}"})",
                                      R"({"name": "f", "parameters": {})",
                                      R"({"name": "f", "parameters": {}} and {braces})",
                                      R"({"name": "f", "parameters": {"a": 1, "a": 2}})",
                                      "<function=f>",
                                      "<function=f>{",
                                      "<function=f{}",
                                      "<function=f>[]</function>",
                                      "<|python_tag|>",
                                      "[f(x)]",
                                      "[f(a=1, a=2)]",
                                      "[f(a=b)]",
                                      "f(a=1)",
                                      "[f(a=1)] and more",
                                      "[f(a=1), 2]",
                                      "[f(a=(1, 2))]",
                                      "[f(a='x)]",
                                      "[f(a=1) g(b=2)]",
                                      "[f(a=007)]",
                                      "[f(a=1e999)]",
                                      "[f(a={1: 2})]",
                                      "[f(a='\\ud800')]",
                                      "[f(a='line\nbreak')]",
                                      "[f(**{})]",
                                      "[f(a=-)]",
                                      "[f(a=.)]",
                                      "[f(a=1.2.3)]",
                                      "[,f()]",
                                      "[f.()]"}) {
    EXPECT_EQ(Llama(text), "") << text;
    EXPECT_EQ(Pythonic(text), "") << text;
  }
  EXPECT_EQ(Pythonic("[f(a=1" + std::string(309, '0') + ")]"), "");  // no JSON reader takes 1e309
}

TEST(ToolCallsTest, ReadsFunctionTags) {
  EXPECT_EQ(Llama("<function=f>{\"n\": 10}</function><|eot_id|>"), R"(f{"n": 10})");
  EXPECT_EQ(Llama("I call <function=f>\n{\"n\": 10}"), R"(f{"n": 10})");
  EXPECT_EQ(Llama("<function=f>{}</function>\n<function=g>{\"s\": \"</function>\"}</function>"),
            R"(f{};g{"s": "</function>"})");
  EXPECT_EQ(Llama("<function=f>{}</function><function=g>nothing"), "");
}

TEST(ToolCallsTest, ReadsWhatFollowsThePythonTag) {
  EXPECT_EQ(Llama("<|python_tag|>brave_search.call(query=\"gold, \\\"1oz\\\"\")<|eom_id|>"),
            R"(brave_search{"query": "gold, \"1oz\""})");
  EXPECT_EQ(Llama("brave_search.call(query='x')"), R"(brave_search{"query": "x"})");
  EXPECT_EQ(Llama("<|python_tag|>{\"name\": \"f\", \"parameters\": {}}<|eom_id|>"), "f{}");
  EXPECT_EQ(Llama("<|python_tag|>[f(a=1)]<|eot_id|>"), R"(f{"a": 1})");
  EXPECT_EQ(Llama("<|python_tag|>d = {\"name\": \"f\", \"parameters\": {}}\nprint(d)"),
            R"x(code_interpreter{"code": "d = {\"name\": \"f\", \"parameters\": {}}\nprint(d)"})x");
  EXPECT_EQ(Llama("print(1)"), "");
}

TEST(ToolCallsTest, ReadsPythonLiterals) {
  EXPECT_EQ(Pythonic("[f(a=1, b=-2.50, c=True, d=None, e='x', f=[1, 'y', [],], g={'k': {'l': false}},)]"),
            R"(f{"a": 1, "b": -2.5, "c": true, "d": null, "e": "x", "f": [1, "y", []], "g": {"k": {"l": false}}})");
  EXPECT_EQ(Pythonic("[ f( a = 1 ) ,\n g() , ]"), R"(f{"a": 1};g{})");
  EXPECT_EQ(Pythonic(R"([f(s='it\'s', t="a\tb\\\x41\u00e9\U0001F680\101\q", u='\ud83d\ude80')])"),
            "f{\"s\": \"it's\", \"t\": \"a\\tb\\\\Aé🚀A\\\\q\", \"u\": \"🚀\"}");
  EXPECT_EQ(Pythonic("[f(code='''a\n'b' ''', t=\"\"\"\"x\"\"\")]"), R"(f{"code": "a\n'b' ", "t": "\"x"})");
  EXPECT_EQ(Pythonic("[f(i=123456789012345678901234567890, z=-0, e=1e-7, w=1E5)]"),
            R"(f{"i": 123456789012345678901234567890, "z": 0, "e": 1e-07, "w": 100000.0})");
  EXPECT_EQ(Pythonic("[spotify.play-song(a=1)]"), R"(spotify.play-song{"a": 1})");
  EXPECT_EQ(Pythonic(R"({"name": "f", "parameters": {}})"), "");
}

TEST(ToolCallsTest, AcceptsOnlyWhatWasOffered) {
  const std::vector<std::string> offered = {"f", "g"};
  const auto parse = [&](std::string_view answer) {
    return Show(ParseToolCalls(answer, ToolDialect::kLlama, offered));
  };
  EXPECT_EQ(parse("[f(), g()]"), "f{};g{}");
  EXPECT_EQ(parse("[f(), h()]"), "");
  EXPECT_EQ(parse(R"({"name": "g", "parameters": {}})"), "g{}");
  EXPECT_EQ(parse(R"({"name": "f", "parameters": {}}; {"name": "h", "parameters": {}})"), "");
  EXPECT_EQ(parse("<function=h>{}</function>"), "");
  EXPECT_EQ(parse("<|python_tag|>print(1)"), "");
  EXPECT_EQ(parse("<|python_tag|>h.call(query='x')"), "");
}

TEST(ToolCallsTest, NumbersTheCalls) {
  const auto calls = ParseToolCalls("[f(), f(), g()]");
  ASSERT_EQ(calls.size(), 3u);
  EXPECT_EQ(calls[0].id, "call_0");
  EXPECT_EQ(calls[2].id, "call_2");
}

TEST(ToolCallsTest, NoDialectMeansText) {
  EXPECT_TRUE(ParseToolCalls(R"({"name": "f", "parameters": {}})", ToolDialect::kNone).empty());
}

std::string Repeat(std::string_view text, size_t n) {
  std::string repeated;
  for (size_t i = 0; i < n; ++i) repeated += text;
  return repeated;
}

// A million bytes that a backtracking or recursive parser would not survive.
TEST(ToolCallsTest, HostileAnswersAreText) {
  constexpr size_t kMany = 1'000'000;
  for (const std::string_view unit :
       {"{", "[", "{\"a\":", "<function=", "<function=f>{", "[f(a=[", "'", "\\", "{\"", "}"}) {
    const std::string hostile = Repeat(unit, kMany / unit.size());
    EXPECT_EQ(Llama(hostile), "") << unit;
    EXPECT_EQ(Llama(StrCat("[f(a=", hostile)), "") << unit;
    EXPECT_EQ(Pythonic(StrCat("[f(a='", hostile)), "") << unit;
  }
}

TEST(ToolCallsTest, LimitsDepth) {
  const auto nested = [](int depth) {
    return StrCat("[f(a=", Repeat("[", static_cast<size_t>(depth)), Repeat("]", static_cast<size_t>(depth)), ")]");
  };
  EXPECT_NE(Pythonic(nested(kMaxJsonDepth - 1)), "");
  EXPECT_EQ(Pythonic(nested(kMaxJsonDepth)), "");
}

TEST(ToolCallsTest, InvalidUtf8IsText) {
  EXPECT_EQ(Llama("{\"name\": \"f\", \"parameters\": {\"a\": \"\xff\"}}"), "");
  EXPECT_EQ(Llama("[f(a='\xff')]"), "");
  EXPECT_EQ(Llama("<function=\xff>{}</function>"), "");
  EXPECT_EQ(Llama("<|python_tag|>print('\xff')"), "");
}

TEST(ToolNamesTest, ReadsBothForms) {
  const auto names =
      ToolNames({R"({"type": "function", "function": {"name": "f"}})", R"({"name": "g", "parameters": {}})"});
  ASSERT_TRUE(names.ok());
  EXPECT_EQ(*names, (std::vector<std::string>{"f", "g"}));
}

TEST(ToolNamesTest, NamesTheField) {
  for (const char* bad : {"", "[]", "{}", "{\"name\": 1}", "{\"name\": \"\"}", "{\"function\": {}}"}) {
    const auto names = ToolNames({R"({"name": "f"})", bad});
    ASSERT_EQ(names.status().code(), Code::kInvalidArgument) << bad;
    EXPECT_EQ(names.status().detail()->field_violations.at(0).field, "tools_json[1]");
  }
}

}  // namespace
}  // namespace altiplano::testing

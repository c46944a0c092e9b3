// The validator's table: for each field its boundaries, and what lies beyond them.
#include "server/frontend/validate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "server/base/strings.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

GenerateInput Plain() {
  GenerateInput input;
  input.prompt = PromptKind::kText;
  input.text = "hello";
  return input;
}

GenerateInput Chat() {
  GenerateInput input;
  input.prompt = PromptKind::kChat;
  input.chat.messages.push_back({.role = Role::kUser, .content = "hi", .tool_calls = {}, .tool_call_id = {}});
  return input;
}

Status Validate(const GenerateInput& input) {
  return ValidateInput(input, TinyModel(), FrontendLimits());
}

// "" when the input is good, else the first field that is not.
std::string Verdict(const GenerateInput& input) {
  Status status = Validate(input);
  if (status.ok()) return "";
  EXPECT_EQ(status.code(), Code::kInvalidArgument) << status.ToString();
  if (status.detail() == nullptr || status.detail()->field_violations.empty()) return status.ToString();
  return status.detail()->field_violations[0].field;
}

struct FloatRow {
  const char* field;
  std::optional<float> SamplingInput::*member;
  std::vector<float> good, bad;
};

TEST(ValidateTest, FloatsAtTheirBounds) {
  const float over1 = std::nextafter(1.0F, 2.0F), under0 = std::nextafter(0.0F, -1.0F);
  const FloatRow rows[] = {
      {"sampling.temperature", &SamplingInput::temperature, {0, 1e-30F, 1, 100}, {under0, -1, 100.1F}},
      {"sampling.top_p", &SamplingInput::top_p, {1e-30F, 0.5F, 1}, {0, -0.1F, over1}},
      {"sampling.min_p", &SamplingInput::min_p, {0, 0.5F, 1}, {under0, over1}},
      {"sampling.presence_penalty", &SamplingInput::presence_penalty, {-2, 0, 2}, {-2.1F, 2.1F}},
      {"sampling.frequency_penalty", &SamplingInput::frequency_penalty, {-2, 0, 2}, {-2.1F, 2.1F}},
      {"sampling.repetition_penalty", &SamplingInput::repetition_penalty, {0.01F, 1, 100}, {0, -1, 0.009F, 101}},
  };
  for (const FloatRow& row : rows) {
    GenerateInput input = Plain();
    for (float value : row.good) {
      input.sampling.*row.member = value;
      EXPECT_EQ(Verdict(input), "") << row.field << " " << value;
    }
    for (float value : row.bad) {
      input.sampling.*row.member = value;
      EXPECT_EQ(Verdict(input), row.field) << value;
    }
    for (float value : {kNan, -kNan, kInf, -kInf}) {
      input.sampling.*row.member = value;
      EXPECT_EQ(Verdict(input), row.field) << value;
    }
  }
}

struct Row {
  const char* field;  // "": the input is good
  std::function<void(GenerateInput&)> change;
};

void Check(const GenerateInput& base, const std::vector<Row>& rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    GenerateInput input = base;
    rows[i].change(input);
    EXPECT_EQ(Verdict(input), rows[i].field) << "row " << i;
  }
}

TEST(ValidateTest, CountsAtTheirBounds) {
  Check(Plain(), {
                     {"", [](auto& in) { in.sampling.num_sequences = 1; }},
                     {"", [](auto& in) { in.sampling.num_sequences = 16; }},
                     {"sampling.num_sequences", [](auto& in) { in.sampling.num_sequences = 0; }},
                     {"sampling.num_sequences", [](auto& in) { in.sampling.num_sequences = 17; }},
                     {"sampling.num_sequences", [](auto& in) { in.sampling.num_sequences = UINT32_MAX; }},
                     {"", [](auto& in) { in.sampling.top_k = 0; }},
                     {"", [](auto& in) { in.sampling.top_k = UINT32_MAX; }},
                     {"", [](auto& in) { in.output.top_logprobs = 20; }},
                     {"output.top_logprobs", [](auto& in) { in.output.top_logprobs = 21; }},
                     {"", [](auto& in) { in.output.prompt_top_logprobs = 0; }},
                     {"output.prompt_top_logprobs", [](auto& in) { in.output.prompt_top_logprobs = UINT32_MAX; }},
                     {"", [](auto& in) { in.stopping.max_new_tokens = 1; }},
                     {"", [](auto& in) { in.stopping.max_new_tokens = UINT32_MAX; }},
                     {"stopping.max_new_tokens", [](auto& in) { in.stopping.max_new_tokens = 0; }},
                     {"",
                      [](auto& in) {
                        in.stopping.max_new_tokens = 5;
                        in.stopping.min_new_tokens = 5;
                      }},
                     {"stopping.min_new_tokens",
                      [](auto& in) {
                        in.stopping.max_new_tokens = 5;
                        in.stopping.min_new_tokens = 6;
                      }},
                     {"output.echo_prompt",
                      [](auto& in) {
                        in.output.omit_text = true;
                        in.output.echo_prompt = true;
                      }},
                 });
}

TEST(ValidateTest, ListsAtTheirBounds) {
  auto bias = [](size_t count, uint32_t first, float value) {
    return [=](GenerateInput& in) {
      for (size_t i = 0; i < count; ++i) in.sampling.logit_bias.emplace_back(first + i, value);
    };
  };
  Check(Plain(), {
                     {"", bias(1024, 0, 100)},
                     {"sampling.logit_bias", bias(1025, 0, 1)},
                     {"", bias(1, 2047, -100)},
                     {"sampling.logit_bias[2048]", bias(1, 2048, 1)},
                     {"sampling.logit_bias[4294967295]", bias(1, UINT32_MAX, 1)},
                     {"sampling.logit_bias[3]", bias(1, 3, 100.5F)},
                     {"sampling.logit_bias[3]", bias(1, 3, kNan)},
                     {"sampling.logit_bias[3]", bias(1, 3, -kInf)},
                     {"", [](auto& in) { in.stopping.sequences.assign(16, std::string(256, 'x')); }},
                     {"stopping.sequences", [](auto& in) { in.stopping.sequences.assign(17, "x"); }},
                     {"stopping.sequences[1]",
                      [](auto& in) {
                        in.stopping.sequences = {"x", ""};
                      }},
                     {"stopping.sequences[0]", [](auto& in) { in.stopping.sequences = {std::string(257, 'x')}; }},
                     {"stopping.sequences[0]", [](auto& in) { in.stopping.sequences = {"\xC3"}; }},
                     {"", [](auto& in) { in.stopping.token_ids.assign(128, 2047); }},
                     {"stopping.token_ids", [](auto& in) { in.stopping.token_ids.assign(129, 1); }},
                     {"stopping.token_ids[1]",
                      [](auto& in) {
                        in.stopping.token_ids = {0, 2048};
                      }},
                     {"stopping.token_ids[0]", [](auto& in) { in.stopping.token_ids = {0x80000000U}; }},
                 });
}

TEST(ValidateTest, Prompts) {
  Check(Plain(), {
                     {"prompt", [](auto& in) { in.prompt = PromptKind::kNone; }},
                     {"", [](auto& in) { in.text = ""; }},  // begins with BOS
                     {"", [](auto& in) { in.text = std::string("a\0b", 3); }},
                     {"", [](auto& in) { in.text = "<|begin_of_text|>"; }},
                     {"", [](auto& in) { in.text = std::string(4 << 20, 'x'); }},
                     {"text", [](auto& in) { in.text = std::string((4 << 20) + 1, 'x'); }},
                     {"text", [](auto& in) { in.text = "\xED\xA0\x80"; }},
                     {"token_ids.ids", [](auto& in) { in.prompt = PromptKind::kTokenIds; }},
                     {"",
                      [](auto& in) {
                        in.prompt = PromptKind::kTokenIds;
                        in.token_ids = {0, 2047};
                      }},
                     {"token_ids.ids[2]",
                      [](auto& in) {
                        in.prompt = PromptKind::kTokenIds;
                        in.token_ids = {0, 2047, UINT32_MAX};
                      }},
                 });
}

TEST(ValidateTest, Chats) {
  auto message = [](std::optional<Role> role, std::string content) {
    return ChatMessageInput{.role = role, .content = std::move(content), .tool_calls = {}, .tool_call_id = {}};
  };
  Check(Chat(),
        {
            {"", [](auto&) {}},
            {"chat.messages", [](auto& in) { in.chat.messages.clear(); }},
            {"", [&](auto& in) { in.chat.messages.assign(2048, message(Role::kUser, "x")); }},
            {"chat.messages", [&](auto& in) { in.chat.messages.assign(2049, message(Role::kUser, "x")); }},
            {"chat.messages[1].role", [&](auto& in) { in.chat.messages.push_back(message(std::nullopt, "x")); }},
            {"chat.messages[0].content", [](auto& in) { in.chat.messages[0].content = "\xFF"; }},
            {"chat", [&](auto& in) { in.chat.messages.assign(3, message(Role::kUser, std::string(2 << 20, 'x'))); }},
            {"chat", [](auto& in) { in.chat.tools_json = {std::string((4 << 20) + 1, ' ')}; }},
            {"chat.tools_json", [](auto& in) { in.chat.tools_json.assign(129, "{}"); }},
            {"chat.tool_choice", [](auto& in) { in.chat.tool_choice = ToolChoiceKind::kUnknown; }},
            {"", [](auto& in) { in.chat.date = "26 Jul 2024"; }},
            {"chat.date", [](auto& in) { in.chat.date = "26\nJul"; }},
            {"chat.date", [](auto& in) { in.chat.date = std::string(65, '1'); }},
        });
}

TEST(ValidateTest, NamesAndTimes) {
  constexpr int64_t kYear = 366 * 24 * 3600;
  auto limit = [](int64_t seconds, int32_t nanos) {
    return [=](GenerateInput& in) { in.stopping.time_limit = DurationInput{seconds, nanos}; };
  };
  Check(Plain(), {
                     {"", [](auto& in) { in.request_id = std::string(128, '~'); }},
                     {"request_id", [](auto& in) { in.request_id = std::string(129, 'x'); }},
                     {"request_id", [](auto& in) { in.request_id = "a b"; }},
                     {"request_id", [](auto& in) { in.request_id = "a\n"; }},
                     {"request_id", [](auto& in) { in.request_id = "\x7F"; }},
                     {"request_id", [](auto& in) { in.request_id = "\xC3\xA9"; }},
                     {"request_id", [](auto& in) { in.request_id = std::string("\0", 1); }},
                     {"", [](auto& in) { in.cache_salt = std::string(128, '\n'); }},
                     {"cache.salt", [](auto& in) { in.cache_salt = std::string(129, 'x'); }},
                     {"scheduling.tenant", [](auto& in) { in.tenant = std::string(129, 'x'); }},
                     {"scheduling.tenant", [](auto& in) { in.tenant = "a b"; }},
                     {"", limit(0, 1)},
                     {"", limit(10 * kYear, 0)},
                     {"stopping.time_limit", limit(0, 0)},
                     {"stopping.time_limit", limit(-1, 0)},
                     {"stopping.time_limit", limit(1, -1)},
                     {"stopping.time_limit", limit(0, 1'000'000'000)},
                     {"stopping.time_limit", limit(INT64_MAX, 0)},
                     {"stopping.time_limit", limit(INT64_MIN, INT32_MIN)},
                     {"scheduling.queue_timeout",
                      [](auto& in) {
                        in.queue_timeout = DurationInput{-1, 0};
                      }},
                     {"scheduling.ttft_target",
                      [](auto& in) {
                        in.ttft_target = DurationInput{0, 0};
                      }},
                     {"min_flush_interval",
                      [](auto& in) {
                        in.min_flush_interval = DurationInput{0, -5};
                      }},
                 });
}

TEST(ValidateTest, AllViolationsUpToAPoint) {
  GenerateInput input = Plain();
  input.request_id = " ";
  input.sampling.top_p = 0;
  input.output.top_logprobs = 99;
  Status status = Validate(input);
  ASSERT_NE(status.detail(), nullptr);
  EXPECT_EQ(status.detail()->field_violations.size(), 3U);
  input.stopping.sequences.assign(1000, "");
  EXPECT_LE(Validate(input).detail()->field_violations.size(), 16U);
}

TEST(ValidateTest, ErrorsDoNotQuotePrompts) {
  GenerateInput input = Plain();
  input.text = "my secret \xFF";
  EXPECT_EQ(Validate(input).ToString().find("secret"), std::string::npos);
  input = Chat();
  input.chat.messages[0].content = "my secret \xFF";
  input.chat.date = "my secret \n";
  EXPECT_EQ(Validate(input).ToString().find("secret"), std::string::npos);
}

TEST(ValidateTest, AnEmptyTextNeedsABos) {
  // The tiny tokenizer has one; a model without is asked for a text.
  class NoBos : public Tokenizer {
   public:
    void Encode(std::string_view, std::vector<TokenId>*) const override {}
    std::string_view TokenBytes(TokenId) const override { return ""; }
    bool IsSpecial(TokenId) const override { return false; }
    std::optional<TokenId> Special(std::string_view) const override { return std::nullopt; }
    int32_t vocab_size() const override { return 2048; }
    std::optional<TokenId> bos() const override { return std::nullopt; }
  };
  ServedModel model = TinyModel();
  model.tokenizer = std::make_shared<NoBos>();
  GenerateInput input = Plain();
  input.text = "";
  EXPECT_EQ(ValidateInput(input, model, FrontendLimits()).code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace altiplano::testing

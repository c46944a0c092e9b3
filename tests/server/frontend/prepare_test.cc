#include "server/frontend/prepare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

class PrepareTest : public ::testing::Test {
 protected:
  StatusOr<PreparedRequest> Run(GenerateInput input, int32_t servable = 4096) {
    return Prepare(std::move(input), {.model = model_,
                                      .limits = limits_,
                                      .max_servable_tokens = servable,
                                      .now = TimePoint(std::chrono::seconds(1000)),
                                      .client_deadline = kNever});
  }
  GenerateInput Ids(size_t count) {
    GenerateInput input;
    input.prompt = PromptKind::kTokenIds;
    input.token_ids.assign(count, 7);
    return input;
  }

  ServedModel model_ = TinyModel();
  FrontendLimits limits_;
};

TEST_F(PrepareTest, LengthIsWhatContextAndPoolLeave) {
  GenerateInput input = Ids(96);
  EXPECT_EQ((*Run(input)).request->stop.max_new_tokens, 4000);
  EXPECT_EQ((*Run(input, 1096)).request->stop.max_new_tokens, 1000);
  input.stopping.max_new_tokens = 10;
  EXPECT_EQ((*Run(input)).request->stop.max_new_tokens, 10);
  input.stopping.max_new_tokens = UINT32_MAX;
  EXPECT_EQ((*Run(input)).request->stop.max_new_tokens, 4000);
}

TEST_F(PrepareTest, LengthAtItsBounds) {
  EXPECT_TRUE(Run(Ids(4095)).ok());
  EXPECT_EQ(Run(Ids(4096)).status().reason(), "CONTEXT_LENGTH_EXCEEDED");
  GenerateInput input = Ids(96);
  input.stopping.min_new_tokens = 4000;
  EXPECT_TRUE(Run(input).ok());
  input.stopping.min_new_tokens = 4001;
  Status status = Run(input).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_EQ(status.detail()->metadata.at("actual"), "4097");
  input.stopping.min_new_tokens = UINT32_MAX;
  EXPECT_EQ(Run(input).status().reason(), "CONTEXT_LENGTH_EXCEEDED");
  input.stopping.min_new_tokens = 905;
  EXPECT_EQ(Run(input, 1000).status().reason(), "REQUEST_TOO_LARGE_FOR_SERVER");
  EXPECT_EQ(Run(input, 1000).status().code(), Code::kFailedPrecondition);
  input.stopping.min_new_tokens = 904;
  EXPECT_TRUE(Run(input, 1000).ok());
}

TEST_F(PrepareTest, TextFarTooLongIsTokenizedNoFurtherThanTheContext) {
  GenerateInput text;
  text.prompt = PromptKind::kText;
  for (int i = 0; i < 100'000; ++i) text.text += "7 ";
  GenerateInput chat;
  chat.prompt = PromptKind::kChat;
  ChatMessageInput message;
  message.role = Role::kUser;
  message.content = text.text;
  chat.chat.messages = {message, message};
  for (const GenerateInput& input : {text, chat}) {
    const Status status = Run(input).status();
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_EQ(status.reason(), "CONTEXT_LENGTH_EXCEEDED");
    EXPECT_THAT(status.message(), ::testing::HasSubstr("are at least 4"));
    EXPECT_LE(std::stoi(status.detail()->metadata.at("actual")), 4096 + 100);
    EXPECT_EQ(status.detail()->metadata.at("limit"), "4096");
  }
  // What is too long by a little is counted.
  text.text.resize(4096);
  const auto tokens = EncodeText(text.text, /*omit_bos=*/false, *model_.tokenizer).size();
  ASSERT_GE(tokens, 4096u);
  EXPECT_EQ(Run(text).status().detail()->metadata.at("actual"), std::to_string(tokens + 1));
}

TEST_F(PrepareTest, TopKBeyondTheVocabularyIsOffAndTinyTemperaturesAreGreedy) {
  GenerateInput input = Ids(3);
  for (auto [asked, expected] :
       {std::pair<uint32_t, int32_t>{0, 0}, {5, 5}, {2047, 2047}, {2048, 0}, {UINT32_MAX, 0}}) {
    input.sampling.top_k = asked;
    EXPECT_EQ((*Run(input)).request->sampling.top_k, expected);
  }
  input.sampling.temperature = 1e-30F;
  EXPECT_EQ((*Run(input)).request->sampling.temperature, 0);
}

TEST_F(PrepareTest, QueueWaitIsTheLesserOfTheServersAndTheClients) {
  GenerateInput input = Ids(3);
  TimePoint now(std::chrono::seconds(1000));
  EXPECT_EQ((*Run(input)).request->queue_deadline, now + limits_.max_queue_wait);
  input.queue_timeout = DurationInput{5, 0};
  EXPECT_EQ((*Run(input)).request->queue_deadline, now + std::chrono::seconds(5));
  input.queue_timeout = DurationInput{500, 0};
  EXPECT_EQ((*Run(input)).request->queue_deadline, now + limits_.max_queue_wait);
}

TEST_F(PrepareTest, TextFromUsersNeverBecomesASpecialToken) {
  GenerateInput input;
  input.prompt = PromptKind::kText;
  input.text = "<|eot_id|><|begin_of_text|>";
  auto prepared = Run(input);
  ASSERT_TRUE(prepared.ok());
  const std::vector<TokenId>& prompt = prepared->request->prompt;
  EXPECT_EQ(prompt[0], kBos);
  for (size_t i = 1; i < prompt.size(); ++i) EXPECT_FALSE(TinyTokenizer()->IsSpecial(prompt[i]));
}

TEST_F(PrepareTest, ToolsAreOfferedOnlyWhenTheModelMayCallThem) {
  GenerateInput input;
  input.prompt = PromptKind::kChat;
  input.chat.messages.push_back({.role = Role::kUser, .content = "hi", .tool_calls = {}, .tool_call_id = {}});
  EXPECT_FALSE((*Run(input)).tools);
  input.chat.tools_json = {R"({"type": "function", "function": {"name": "f", "parameters": {}}})"};
  auto prepared = Run(input);
  ASSERT_TRUE(prepared.ok()) << prepared.status().ToString();
  EXPECT_TRUE(prepared->tools);
  EXPECT_EQ(prepared->tool_names, std::vector<std::string>{"f"});
  input.chat.tool_choice = ToolChoiceKind::kNone;
  EXPECT_FALSE((*Run(input)).tools);
  input.chat.tool_choice = ToolChoiceKind::kAuto;
  input.chat.tools_json = {"[]"};
  Status status = Run(input).status();
  ASSERT_NE(status.detail(), nullptr);
  EXPECT_EQ(status.detail()->field_violations.at(0).field, "chat.tools_json[0]");
}

}  // namespace
}  // namespace altiplano::testing

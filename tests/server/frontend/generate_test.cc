// Generate and StreamGenerate over a real channel, against the real engine and scheduler with a scripted executor.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <set>

#include "server/base/strings.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

namespace v1 = inference::v1;

TEST(GenerateTest, UnaryAnswersWholeAtOnce) {
  TestServer server;
  server.SetScript(Say(Encode(" Hello, world.")));
  v1::GenerateRequest request = TextRequest("Say hello");
  request.set_request_id("my-id");
  request.mutable_sampling()->set_seed(7);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  grpc::Status status = server.stub().Generate(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  auto prompt_tokens = static_cast<uint32_t>(Encode("Say hello").size() + 1);
  auto answer_tokens = static_cast<uint32_t>(Encode(" Hello, world.").size() + 1);
  EXPECT_EQ(response.prompt().request_id(), "my-id");
  EXPECT_EQ(response.prompt().tokens(), prompt_tokens);
  EXPECT_EQ(response.prompt().seed(), 7);
  ASSERT_EQ(response.sequences_size(), 1);
  EXPECT_EQ(response.sequences(0).text(), " Hello, world.");
  EXPECT_EQ(response.sequences(0).token_ids_size(), 0);
  EXPECT_EQ(response.sequences(0).logprobs_size(), 0);
  EXPECT_EQ(response.sequences(0).finish().reason(), v1::FINISH_REASON_EOS);
  EXPECT_EQ(response.sequences(0).finish().stop_token_id(), kEot);
  EXPECT_EQ(response.sequences(0).finish().tokens(), answer_tokens);
  EXPECT_EQ(response.usage().prompt_tokens(), prompt_tokens);
  EXPECT_EQ(response.usage().completion_tokens(), answer_tokens);
  EXPECT_GT(response.timing().total().seconds() * 1'000'000'000 + response.timing().total().nanos(), 0);
  server.WaitForNoCalls();
}

TEST(GenerateTest, StreamStartsDeltasCompletes) {
  TestServer server;
  server.SetScript(Say(ByteTokens("streaming")));
  StreamResult result = Stream(server.stub(), TextRequest("go"));
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_NE(result.started(), nullptr);
  EXPECT_EQ(result.started()->request_id().size(), 36U);
  EXPECT_EQ(result.text(), "streaming");
  EXPECT_EQ(result.num_tokens(), 10U);
  ASSERT_TRUE(result.finish());
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_EOS);
  ASSERT_NE(result.completed(), nullptr);
  EXPECT_EQ(result.completed()->usage().completion_tokens(), 10U);
  server.WaitForNoCalls();
}

TEST(GenerateTest, UnsetSeedIsRandomAndReturned) {
  TestServer server;
  std::mutex mutex;
  std::vector<uint64_t> used;
  server.SetScript([&](const Request& request, uint32_t, int32_t index) {
    std::lock_guard lock(mutex);
    if (index == 0) used.push_back(request.sampling.seed);
    return kEot;
  });
  StreamResult one = Stream(server.stub(), TextRequest("go")), two = Stream(server.stub(), TextRequest("go"));
  ASSERT_EQ(used.size(), 2U);
  EXPECT_EQ(one.started()->seed(), used[0]);
  EXPECT_EQ(two.started()->seed(), used[1]);
  EXPECT_NE(used[0], used[1]);
}

TEST(GenerateTest, LengthAndTokenIds) {
  TestServer server;
  v1::GenerateRequest request;
  for (TokenId id : ByteTokens("xyz")) request.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
  request.mutable_stopping()->set_max_new_tokens(5);
  request.mutable_output()->set_token_ids(true);
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.started()->tokens(), 3U);  // no BOS is added to ids
  EXPECT_EQ(result.text(), "abcde");
  std::vector<TokenId> expected = ByteTokens("abcde");
  EXPECT_THAT(result.token_ids(), ::testing::ElementsAreArray(expected.begin(), expected.end()));
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(result.finish()->matched_case(), v1::Finish::MATCHED_NOT_SET);
}

TEST(GenerateTest, StopStringAcrossTokensEndsTheSequenceInTheEngineToo) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(1));  // so that 2000 steps are not over before the engine hears of it
  v1::GenerateRequest request = TextRequest("go", 2000);
  request.mutable_stopping()->add_sequences("never");
  request.mutable_stopping()->add_sequences("hij");
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.text(), "abcdefg");
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(result.finish()->stop_sequence(), "hij");
  EXPECT_EQ(result.finish()->tokens(), 10U);
  EXPECT_EQ(result.completed()->usage().completion_tokens(), 10U);
  server.WaitForNoCalls();
  EXPECT_LT(server.steps(), 1000);
}

TEST(GenerateTest, SeveralSequencesKeepTheirTexts) {
  TestServer server;
  server.SetScript([](const Request&, uint32_t sequence, int32_t index) {
    return index <= static_cast<int32_t>(sequence) ? ByteTokens("ABCD")[sequence] : kEot;
  });
  v1::GenerateRequest request = TextRequest("go");
  request.mutable_sampling()->set_num_sequences(4);
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.text(0), "A");
  EXPECT_EQ(result.text(1), "BB");
  EXPECT_EQ(result.text(2), "CCC");
  EXPECT_EQ(result.text(3), "DDDD");
  for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(result.finish(i)->reason(), v1::FINISH_REASON_EOS);
  EXPECT_EQ(result.completed()->usage().completion_tokens(), 1 + 2 + 3 + 4 + 4U);
  EXPECT_EQ(result.completed()->usage().prompt_tokens(), result.started()->tokens());

  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(server.stub().Generate(&context, request, &response).ok());
  ASSERT_EQ(response.sequences_size(), 4);
  EXPECT_EQ(response.sequences(2).text(), "CCC");
  EXPECT_EQ(response.sequences(3).index(), 3U);
}

TEST(GenerateTest, SplitCodePointsArriveWhole) {
  TestServer server;
  const std::string text = "grüße, 世界 🙂!";
  server.SetScript(Say(ByteTokens(text)));
  StreamResult result = Stream(server.stub(), TextRequest("go"));
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.text(), text);
  for (const auto& message : result.messages) {
    for (const auto& delta : message.deltas().items()) EXPECT_TRUE(IsValidUtf8(delta.text())) << delta.text();
  }
}

TEST(GenerateTest, LogprobsOfTokensAndPrompt) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("some prompt", 3);
  request.mutable_output()->set_top_logprobs(2);
  request.mutable_output()->set_prompt_top_logprobs(1);
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok());
  std::vector<v1::TokenLogprob> prompt, tokens;
  bool deltas_began = false;
  for (const auto& message : result.messages) {
    if (message.has_started()) {
      EXPECT_FALSE(deltas_began);
      prompt.insert(prompt.end(), message.started().logprobs().begin(), message.started().logprobs().end());
    }
    deltas_began |= message.has_deltas();
    for (const auto& delta : message.deltas().items()) {
      tokens.insert(tokens.end(), delta.logprobs().begin(), delta.logprobs().end());
    }
  }
  std::vector<TokenId> ids = Encode("some prompt");
  ASSERT_EQ(prompt.size(), ids.size());  // all but the BOS
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(prompt[i].token_id(), static_cast<uint32_t>(ids[i]));
    EXPECT_EQ(prompt[i].token_bytes(), TinyTokenizer()->TokenBytes(ids[i]));
    EXPECT_EQ(prompt[i].top_size(), 1);
  }
  ASSERT_EQ(tokens.size(), 3U);
  EXPECT_EQ(tokens[1].token_bytes(), "b");
  EXPECT_EQ(tokens[1].logprob(), -0.5F);
  EXPECT_EQ(tokens[1].rank(), 1U);
  ASSERT_EQ(tokens[1].top_size(), 2);
  EXPECT_EQ(tokens[1].top(1).token_id(), 1U);
  EXPECT_EQ(tokens[1].top(1).rank(), 2U);
  EXPECT_EQ(tokens[1].top(1).logprob(), -2.0F);
  EXPECT_EQ(tokens[1].top(1).token_bytes(), TinyTokenizer()->TokenBytes(1));

  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(server.stub().Generate(&context, request, &response).ok());
  EXPECT_EQ(response.prompt().logprobs_size(), static_cast<int>(ids.size()));
  EXPECT_EQ(response.sequences(0).logprobs_size(), 3);
}

TEST(GenerateTest, EchoSpecialTokensAndStops) {
  TestServer server;
  std::vector<TokenId> answer = Encode("yes");
  server.SetScript(Say(answer));
  v1::GenerateRequest request = TextRequest("Is it? ");
  request.mutable_output()->set_echo_prompt(true);
  EXPECT_EQ(Stream(server.stub(), request).text(), "Is it? yes");
  request.mutable_output()->set_keep_special_tokens(true);
  EXPECT_EQ(Stream(server.stub(), request).text(), "<|begin_of_text|>Is it? yes");
  request.mutable_stopping()->set_include_stop_in_output(true);
  StreamResult all = Stream(server.stub(), request);
  EXPECT_EQ(all.text(), "<|begin_of_text|>Is it? yes<|eot_id|>");
  EXPECT_EQ(all.num_tokens(), answer.size() + 1);
  request.mutable_output()->Clear();
  request.mutable_output()->set_omit_text(true);
  StreamResult none = Stream(server.stub(), request);
  EXPECT_EQ(none.text(), "");
  EXPECT_EQ(none.num_tokens(), answer.size() + 1);
}

TEST(GenerateTest, StopTokenIsInTheIdsAndNotInTheText) {
  TestServer server;
  v1::GenerateRequest request = TextRequest("go");
  auto e = static_cast<uint32_t>(ByteTokens("e")[0]);
  request.mutable_stopping()->add_token_ids(e);
  request.mutable_output()->set_token_ids(true);
  StreamResult result = Stream(server.stub(), request);
  EXPECT_EQ(result.text(), "abcd");
  EXPECT_EQ(result.token_ids().size(), 5U);
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(result.finish()->stop_token_id(), e);
  EXPECT_EQ(result.completed()->usage().completion_tokens(), 5U);
  request.mutable_stopping()->set_include_stop_in_output(true);
  EXPECT_EQ(Stream(server.stub(), request).text(), "abcde");
}

TEST(GenerateTest, ChatIsRenderedAndToolCallsAreParsed) {
  TestServer server;
  server.SetScript(Say(Encode(R"({"name": "weather", "parameters": {"city": "Lima"}})")));
  v1::GenerateRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content("Weather in Lima? <|eot_id|>");
  // Without tools an answer that looks like a call is text.
  EXPECT_EQ(Stream(server.stub(), request).finish()->reason(), v1::FINISH_REASON_EOS);
  request.mutable_chat()->add_tools_json(
      R"({"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}})");
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_TOOL_CALL);
  ASSERT_EQ(result.finish()->tool_calls_size(), 1);
  EXPECT_EQ(result.finish()->tool_calls(0).name(), "weather");
  EXPECT_EQ(result.finish()->tool_calls(0).arguments_json(), R"({"city": "Lima"})");
  uint32_t with_tools = result.started()->tokens();
  request.mutable_chat()->mutable_tool_choice()->set_mode(v1::TOOL_MODE_NONE);
  StreamResult none = Stream(server.stub(), request);
  EXPECT_EQ(none.finish()->reason(), v1::FINISH_REASON_EOS);
  EXPECT_LT(none.started()->tokens(), with_tools);

  // The very ids that Tokenize shows.
  grpc::ClientContext context;
  v1::TokenizeRequest tokenize;
  *tokenize.mutable_chat() = request.chat();
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(server.stub().Tokenize(&context, tokenize, &tokens).ok());
  EXPECT_EQ(tokens.count(), none.started()->tokens());
}

TEST(GenerateTest, ModelDefaultsApplyWhereTheRequestIsSilent) {
  TestServer::Options options;
  options.model.defaults = {.temperature = 0.6F, .top_p = 0.9F, .min_p = {}, .repetition_penalty = {}, .top_k = 40};
  TestServer server(options);
  std::mutex mutex;
  SamplingParams used;
  server.SetScript([&](const Request& request, uint32_t, int32_t) {
    std::lock_guard lock(mutex);
    used = request.sampling;
    return kEot;
  });
  v1::GenerateRequest request = TextRequest("go");
  request.mutable_sampling()->set_top_p(1);
  ASSERT_TRUE(Stream(server.stub(), request).status.ok());
  EXPECT_EQ(used.temperature, 0.6F);
  EXPECT_EQ(used.top_p, 1.0F);
  EXPECT_EQ(used.top_k, 40);
  EXPECT_EQ(used.min_p, 0.0F);
  request.mutable_sampling()->set_temperature(0);
  ASSERT_TRUE(Stream(server.stub(), request).status.ok());
  EXPECT_EQ(used.temperature, 0.0F);
}

TEST(GenerateTest, TimeLimitReturnsWhatThereIs) {
  TestServer server;
  server.SetStepTime(std::chrono::milliseconds(2));
  v1::GenerateRequest request = TextRequest("go", 4000);
  request.mutable_stopping()->mutable_time_limit()->set_nanos(50'000'000);
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.finish()->reason(), v1::FINISH_REASON_TIME_LIMIT);
  EXPECT_EQ(result.text().substr(0, 3), "abc");
  EXPECT_EQ(result.completed()->usage().completion_tokens(), result.num_tokens());
  server.WaitForNoCalls();
}

TEST(GenerateTest, MinFlushIntervalMergesTokens) {
  TestServer server;
  v1::StreamGenerateRequest request;
  *request.mutable_request() = TextRequest("go", 500);
  request.mutable_min_flush_interval()->set_seconds(3600);
  StreamResult result = Stream(server.stub(), request);
  ASSERT_TRUE(result.status.ok());
  // started, the first tokens, the rest at the end, completed.
  EXPECT_LE(result.messages.size(), 4U);
  EXPECT_EQ(result.num_tokens(), 500U);
  EXPECT_EQ(result.text().size(), 500U);
}

TEST(GenerateTest, ManyStreamsAtOnceGetTheirOwnTokens) {
  TestServer server;
  server.SetScript([](const Request& request, uint32_t, int32_t index) {
    // What a stream must get depends on its prompt alone.
    return index < 40 ? request.prompt[1 + static_cast<size_t>(index) % (request.prompt.size() - 1)] : kEot;
  });
  std::vector<std::thread> threads;
  std::vector<std::string> texts(64);
  for (size_t i = 0; i < texts.size(); ++i) {
    threads.emplace_back([&, i] {
      v1::GenerateRequest request;
      request.mutable_token_ids()->add_ids(kBos);
      for (TokenId id : ByteTokens(std::to_string(1000 + i))) {
        request.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
      }
      StreamResult result = Stream(server.stub(), request);
      EXPECT_TRUE(result.status.ok()) << result.status.error_message();
      texts[i] = result.text();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < texts.size(); ++i) {
    std::string expected;
    for (int repeat = 0; repeat < 10; ++repeat) expected += std::to_string(1000 + i);
    EXPECT_EQ(texts[i], expected);
  }
  server.WaitForNoCalls();
}

}  // namespace
}  // namespace altiplano::testing

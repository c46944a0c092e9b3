#include "server/frontend/sequence_output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/base/strings.h"
#include "tests/server/frontend/frontend_testlib.h"

namespace altiplano::testing {
namespace {

namespace v1 = inference::v1;

class SequenceOutputTest : public ::testing::Test {
 protected:
  SequenceOutputTest() { options_.request = request_; }
  SequenceOutput Make() { return SequenceOutput(3, options_, TinyTokenizer()); }
  static TokenScore Score(TokenId id) {
    TokenScore score;
    score.token = id;
    return score;
  }
  // Feeds tokens; returns what was taken after each.
  static std::vector<std::string> Feed(SequenceOutput& output, const std::vector<TokenId>& tokens) {
    std::vector<std::string> texts;
    for (TokenId id : tokens) {
      stopped_ = output.OnToken(Score(id), FinishReason::kNone, -1);
      v1::Delta delta;
      if (output.due()) output.Take(&delta);
      texts.push_back(delta.text());
    }
    return texts;
  }

  std::shared_ptr<Request> request_ = std::make_shared<Request>();
  PreparedRequest options_;
  static bool stopped_;
};
bool SequenceOutputTest::stopped_ = false;

TEST_F(SequenceOutputTest, HoldsBackWhatMayBecomeAStopString) {
  options_.stop_strings = {"END", "\n\n"};
  SequenceOutput output = Make();
  EXPECT_THAT(Feed(output, ByteTokens("aENx")), ::testing::ElementsAre("a", "", "", "ENx"));
  EXPECT_THAT(Feed(output, ByteTokens("bEND")), ::testing::ElementsAre("b", "", "", ""));
  EXPECT_TRUE(stopped_);
  EXPECT_EQ(output.finish(), FinishReason::kStop);
  EXPECT_EQ(output.tokens(), 8U);
  // What the engine made before it heard of the match.
  EXPECT_FALSE(output.OnToken(Score(ByteTokens("z")[0]), FinishReason::kNone, -1));
  EXPECT_EQ(output.tokens(), 8U);
  EXPECT_FALSE(output.due());
}

TEST_F(SequenceOutputTest, TheDeltaWithTheMatchHasTheFinish) {
  options_.stop_strings = {"bc"};
  SequenceOutput output = Make();
  Feed(output, ByteTokens("ab"));
  EXPECT_TRUE(output.OnToken(Score(ByteTokens("c")[0]), FinishReason::kNone, -1));
  ASSERT_TRUE(output.due());
  v1::Delta delta;
  output.Take(&delta);
  EXPECT_EQ(delta.index(), 3U);
  EXPECT_EQ(delta.text(), "");
  EXPECT_EQ(delta.num_tokens(), 2U);  // "b" was held back, nothing was sent for it
  EXPECT_EQ(delta.finish().reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(delta.finish().stop_sequence(), "bc");
  EXPECT_EQ(delta.finish().tokens(), 3U);
}

TEST_F(SequenceOutputTest, IncludedStopString) {
  options_.stop_strings = {"bc"};
  options_.include_stop = true;
  SequenceOutput output = Make();
  EXPECT_THAT(Feed(output, ByteTokens("abcd")), ::testing::ElementsAre("a", "", "bc", ""));
}

TEST_F(SequenceOutputTest, AStopThatTheEngineEndedAnywayNeedsNoStop) {
  options_.stop_strings = {"b"};
  SequenceOutput output = Make();
  EXPECT_FALSE(output.OnToken(Score(ByteTokens("b")[0]), FinishReason::kLength, -1));
  EXPECT_EQ(output.finish(), FinishReason::kStop);
}

TEST_F(SequenceOutputTest, TailsComeOutAtTheEnd) {
  options_.stop_strings = {"END"};
  SequenceOutput output = Make();
  Feed(output, ByteTokens("xEN"));
  output.OnFinished(FinishReason::kLength, -1);
  v1::Delta delta;
  output.Take(&delta);
  EXPECT_EQ(delta.text(), "EN");
  EXPECT_EQ(delta.finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_FALSE(output.due());

  SequenceOutput half = Make();
  EXPECT_THAT(Feed(half, ByteTokens("\xF0\x9F\x99")), ::testing::Each(""));
  half.OnFinished(FinishReason::kTimeLimit, -1);
  half.Take(&delta);
  EXPECT_EQ(delta.text(), "\uFFFD");
}

TEST_F(SequenceOutputTest, StopStringWithinACodePointsBytes) {
  options_.stop_strings = {"世界"};
  SequenceOutput output = Make();
  std::string text;
  for (const std::string& part : Feed(output, ByteTokens("hi 世界!"))) {
    EXPECT_TRUE(IsValidUtf8(part));
    text += part;
  }
  EXPECT_EQ(text, "hi ");
  EXPECT_EQ(output.tokens(), 9U);
}

TEST_F(SequenceOutputTest, IdsAndScoresDoNotWaitForText) {
  options_.stop_strings = {"ab"};
  options_.token_ids = true;
  request_->sampling.top_logprobs = 0;
  SequenceOutput output = Make();
  output.OnToken(Score(ByteTokens("a")[0]), FinishReason::kNone, -1);
  ASSERT_TRUE(output.due());
  EXPECT_GT(output.pending_bytes(), 0);
  v1::Delta delta;
  output.Take(&delta);
  EXPECT_EQ(delta.text(), "");
  EXPECT_EQ(delta.token_ids_size(), 1);
  EXPECT_EQ(delta.logprobs_size(), 1);
  EXPECT_EQ(output.pending_bytes(), 0);
}

TEST_F(SequenceOutputTest, EchoComesFirstInPiecesOfWholeCodePoints) {
  for (int i = 0; i < 200'000; ++i) options_.echo += "é";
  options_.echo += "x";
  SequenceOutput output = Make();
  output.OnToken(Score(ByteTokens("a")[0]), FinishReason::kLength, -1);
  std::string text;
  int pieces = 0;
  for (; output.due(); ++pieces) {
    v1::Delta delta;
    output.Take(&delta);
    EXPECT_TRUE(IsValidUtf8(delta.text()));
    EXPECT_LE(delta.text().size(), 256U << 10);
    text += delta.text();
    EXPECT_EQ(delta.has_finish(), !output.due());
  }
  EXPECT_EQ(pieces, 3);
  EXPECT_EQ(text, options_.echo + "a");
}

TEST_F(SequenceOutputTest, ToolCallsAreFoundOnlyInWholeAnswersAndAmongTheOffered) {
  options_.tools = true;
  options_.tool_names = {"f"};
  options_.tool_dialect = ToolDialect::kLlama;
  auto run = [&](std::string_view answer, FinishReason finish) {
    SequenceOutput output = Make();
    Feed(output, ByteTokens(answer));
    output.OnToken(Score(kEot), finish, finish == FinishReason::kEos ? kEot : -1);
    return output.finish();
  };
  const std::string call = R"({"name": "f", "parameters": {"a": 1}})";
  EXPECT_EQ(run(call, FinishReason::kEos), FinishReason::kToolCall);
  EXPECT_EQ(run(call, FinishReason::kLength), FinishReason::kLength);
  EXPECT_EQ(run(R"({"name": "g", "parameters": {}})", FinishReason::kEos), FinishReason::kEos);
  EXPECT_EQ(run("plain text", FinishReason::kEos), FinishReason::kEos);
}

}  // namespace
}  // namespace altiplano::testing

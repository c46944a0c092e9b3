#include "server/bench/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "server/base/strings.h"
#include "server/bench/read_file.h"

namespace altiplano::bench {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;

const Vocabulary kVocabulary = {.size = 50, .excluded = {0, 7, 49}};

DatasetOptions Options(std::string name) {
  DatasetOptions options;
  options.name = std::move(name);
  return options;
}
Dataset Parse(const DatasetOptions& options, std::string_view contents) {
  auto dataset = ParseDataset(options, contents, nullptr);
  EXPECT_TRUE(dataset.ok()) << dataset.status().ToString();
  return dataset.ok() ? *dataset : Dataset();
}
std::string Refusal(const DatasetOptions& options, std::string_view contents) {
  auto dataset = ParseDataset(options, contents, nullptr);
  EXPECT_EQ(dataset.status().code(), Code::kInvalidArgument);
  return dataset.status().message();
}
size_t CommonPrefix(const std::vector<TokenId>& a, const std::vector<TokenId>& b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

// --- Prompts ---------------------------------------------------------------------------------------------------------

TEST(PromptOf, DrawsAllowedIdsAndTheSameOnesAgain) {
  LoadRequest request;
  request.parts = {{.stream = 1, .length = 3000}, {.stream = 2, .length = 10}};
  request.input_tokens = 3010;
  std::vector<TokenId> ids = PromptOf(request, kVocabulary);
  ASSERT_EQ(ids.size(), 3010u);
  EXPECT_EQ(PromptOf(request, kVocabulary), ids);
  std::set<TokenId> seen(ids.begin(), ids.end());
  EXPECT_EQ(seen.size(), 47u) << "each of the allowed ids comes up";
  for (TokenId excluded : kVocabulary.excluded) EXPECT_FALSE(seen.contains(excluded));

  LoadRequest shorter;
  shorter.parts = {{.stream = 1, .length = 100}};
  EXPECT_EQ(CommonPrefix(PromptOf(shorter, kVocabulary), ids), 100u)
      << "a stream's beginning does not depend on length";
}

TEST(Random, LengthsSeedsAndNoSharedPrefixes) {
  DatasetOptions options = Options("random");
  options.num_prompts = 20;
  options.input_len = 30;
  options.output_len = 9;
  Dataset dataset = Parse(options, "");
  ASSERT_EQ(dataset.requests.size(), 20u);
  EXPECT_FALSE(dataset.timed);
  for (const LoadRequest& request : dataset.requests) {
    EXPECT_EQ(request.input_tokens, 30);
    EXPECT_EQ(request.output_tokens, 9);
    EXPECT_EQ(PromptOf(request, kVocabulary).size(), 30u);
  }
  auto prompt = [&](const Dataset& d, size_t i) { return PromptOf(d.requests[i], kVocabulary); };
  EXPECT_LT(CommonPrefix(prompt(dataset, 0), prompt(dataset, 1)), 8u);
  EXPECT_EQ(prompt(Parse(options, ""), 5), prompt(dataset, 5));
  options.seed = 1;
  EXPECT_NE(prompt(Parse(options, ""), 5), prompt(dataset, 5));
}

TEST(Dataset, TwoOfOneSeedShareNothing) {
  Dataset random = Parse(Options("random"), "");
  Dataset lengths = Parse(Options("lengths"), "ContextTokens,GeneratedTokens\n128,5\n");
  EXPECT_LT(CommonPrefix(PromptOf(random.requests[0], kVocabulary), PromptOf(lengths.requests[0], kVocabulary)), 8u);
}

TEST(Random, RangeRatioSpreadsBothLengths) {
  DatasetOptions options = Options("random");
  options.num_prompts = 2000;
  options.input_len = 100;
  options.output_len = 10;
  options.range_ratio = 0.5;
  std::set<int32_t> inputs, outputs;
  for (const LoadRequest& request : Parse(options, "").requests) {
    inputs.insert(request.input_tokens);
    outputs.insert(request.output_tokens);
  }
  EXPECT_EQ(*inputs.begin(), 50);
  EXPECT_EQ(*inputs.rbegin(), 150);
  EXPECT_EQ(*outputs.begin(), 5);
  EXPECT_EQ(*outputs.rbegin(), 15);
}

TEST(Random, SharedBeginningsAreUsedInTurn) {
  DatasetOptions options = Options("random");
  options.num_prompts = 6;
  options.input_len = 20;
  options.prefix_len = 40;
  options.num_prefixes = 3;
  Dataset dataset = Parse(options, "");
  auto common = [&](size_t i, size_t j) {
    return CommonPrefix(PromptOf(dataset.requests[i], kVocabulary), PromptOf(dataset.requests[j], kVocabulary));
  };
  EXPECT_EQ(dataset.requests[0].input_tokens, 60);
  EXPECT_GE(common(0, 3), 40u);
  EXPECT_LT(common(0, 3), 50u) << "only the beginning is shared";
  EXPECT_LT(common(0, 1), 10u);
}

// --- Traces ----------------------------------------------------------------------------------------------------------

constexpr std::string_view kAzure =
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-30 23:59:59.5000000,374,44\r\n"
    "2023-12-01 00:00:01.2500000,396,109\r\n"
    "2023-12-01 00:00:01.2500000,10,1\r\n";

TEST(Azure, LengthsAndTimesFromTheFirstRequest) {
  Dataset dataset = Parse(Options("azure"), kAzure);
  ASSERT_EQ(dataset.requests.size(), 3u);
  EXPECT_TRUE(dataset.timed);
  EXPECT_EQ(dataset.requests[0].arrival, Duration(0));
  EXPECT_EQ(dataset.requests[1].arrival, milliseconds(1750)) << "over midnight and the end of a month";
  EXPECT_EQ(dataset.requests[1].input_tokens, 396);
  EXPECT_EQ(dataset.requests[1].output_tokens, 109);
}

TEST(Azure, ScaledCutAndLeftOut) {
  DatasetOptions options = Options("azure");
  options.length_scale = 0.1;
  EXPECT_EQ(Parse(options, kAzure).requests[0].input_tokens, 37);
  EXPECT_EQ(Parse(options, kAzure).requests[2].output_tokens, 1) << "never below one token";
  options.length_scale = 1e6;
  EXPECT_EQ(Parse(options, kAzure).requests[0].input_tokens, 1 << 24) << "nor above what any model could take";
  options = Options("azure");
  options.max_tokens = 418;
  Dataset dataset = Parse(options, kAzure);
  EXPECT_EQ(dataset.left_out, 1);
  ASSERT_EQ(dataset.requests.size(), 2u);
  EXPECT_EQ(dataset.requests[0].input_tokens + dataset.requests[0].output_tokens, 418);
  EXPECT_EQ(dataset.requests[1].input_tokens, 10);
  options.output_len = 400;
  EXPECT_EQ(Parse(options, kAzure).requests[0].output_tokens, 400);
  options.max_tokens = 5;
  EXPECT_THAT(Refusal(options, kAzure), HasSubstr("3 of 3 were longer than 5 tokens"));
  options = Options("azure");
  options.num_prompts = 2;
  EXPECT_EQ(Parse(options, kAzure).requests.size(), 2u);
}

TEST(Azure, BadFilesNameTheLine) {
  auto refusal = [](const char* text) { return Refusal(Options("azure"), text); };
  EXPECT_THAT(refusal("a,b\n1,2\n"), HasSubstr("line 1 must name the columns TIMESTAMP"));
  const std::string header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
  EXPECT_THAT(refusal((header + "2023-11-16 18:15:46.68,1\n").c_str()), HasSubstr("line 2 has 2 fields"));
  for (const char* time : {"2023-13-16 18:15:46.68", "9999-01-01 00:00:00", "2023-11-16 18:-5:46", "2023-11-16"}) {
    EXPECT_THAT(refusal(StrCat(header, time, ",1,1\n").c_str()), HasSubstr("line 2: the time")) << time;
  }
  for (const char* bad : {"0,1", "x,1", "1,-1", "1,99999999999"}) {
    EXPECT_THAT(refusal(StrCat(header, "\n2023-11-16 18:15:46,", bad, "\n").c_str()),
                HasSubstr("line 3: token counts"));
  }
  EXPECT_THAT(refusal(header.c_str()), HasSubstr("there is no request in it"));
}

TEST(Lengths, NeedNoTimes) {
  Dataset dataset = Parse(Options("lengths"), "num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.85\n");
  ASSERT_EQ(dataset.requests.size(), 1u);
  EXPECT_FALSE(dataset.timed);
  EXPECT_EQ(dataset.requests[0].input_tokens, 3772);
}

constexpr std::string_view kMooncake =
    R"({"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]})"
    "\n"
    R"({"timestamp": 700, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 9]})"
    "\n"
    R"({"timestamp": 700, "input_length": 512, "output_length": 6, "hash_ids": [3]})"
    "\n";

TEST(Mooncake, EqualHashIdsAreEqualTokens) {
  Dataset dataset = Parse(Options("mooncake"), kMooncake);
  ASSERT_EQ(dataset.requests.size(), 3u);
  std::vector<std::vector<TokenId>> prompts;
  for (const LoadRequest& request : dataset.requests) {
    prompts.push_back(PromptOf(request, kVocabulary));
    EXPECT_EQ(prompts.back().size(), static_cast<size_t>(request.input_tokens));
  }
  EXPECT_EQ(prompts[0].size(), 1100u);
  EXPECT_GE(CommonPrefix(prompts[0], prompts[1]), 1024u);
  EXPECT_LT(CommonPrefix(prompts[0], prompts[1]), 1030u) << "the third block differs";
  EXPECT_LT(CommonPrefix(prompts[0], prompts[2]), 8u);
  EXPECT_EQ(dataset.requests[1].arrival, milliseconds(200));
}

TEST(Mooncake, ScaledBlocksAreStillShared) {
  DatasetOptions options = Options("mooncake");
  options.length_scale = 1.0 / 32;
  Dataset dataset = Parse(options, kMooncake);
  EXPECT_EQ(dataset.requests[0].input_tokens, 34);
  EXPECT_EQ(PromptOf(dataset.requests[0], kVocabulary).size(), 34u);
  EXPECT_GE(CommonPrefix(PromptOf(dataset.requests[0], kVocabulary), PromptOf(dataset.requests[1], kVocabulary)), 32u);
}

TEST(Mooncake, BadLinesAreNamed) {
  auto refusal = [](const char* text) { return Refusal(Options("mooncake"), text); };
  EXPECT_THAT(refusal("{"), HasSubstr("line 1: "));
  EXPECT_THAT(refusal("[]"), HasSubstr("line 1 must be a JSON object"));
  EXPECT_THAT(refusal(R"({"timestamp": 5, "input_length": 1100, "output_length": 5})"), HasSubstr("hash_ids"));
  EXPECT_THAT(refusal(R"({"timestamp": 5, "input_length": 1100, "output_length": 5, "hash_ids": [0, -1, 2]})"),
              HasSubstr("hash_ids"));
  EXPECT_THAT(refusal(R"({"timestamp": 5, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1]})"),
              HasSubstr("has 2 hash_ids, 1100 tokens are 3 blocks of 512"));
}

// --- ShareGPT --------------------------------------------------------------------------------------------------------

TEST(ShareGpt, TokenIdsAreSentAsTheyAre) {
  Dataset dataset = Parse(Options("sharegpt"), R"({"input_toks": 3, "output_toks": 5, "arrival_time_ns": 1000, )"
                                               R"("input_tok_ids": [5, 6, 49], "output_tok_ids": [1]})"
                                               "\n");
  ASSERT_EQ(dataset.requests.size(), 1u);
  EXPECT_THAT(PromptOf(dataset.requests[0], kVocabulary), ElementsAre(5, 6, 49));
  EXPECT_EQ(CountForeign(dataset, 50), 0);
  EXPECT_EQ(dataset.requests[0].input_tokens, 3);
  EXPECT_EQ(dataset.requests[0].output_tokens, 5);
  EXPECT_TRUE(dataset.timed);
  EXPECT_FALSE(Parse(Options("sharegpt"), R"({"output_toks": 5, "input_tok_ids": [5]})").timed);
  EXPECT_THAT(Refusal(Options("sharegpt"), R"({"output_toks": 5, "input_tok_ids": []})"), HasSubstr("line 1"));
  EXPECT_THAT(Refusal(Options("sharegpt"), R"({"output_toks": 5, "input_tok_ids": [1.5]})"), HasSubstr("line 1"));
}

TEST(ShareGpt, IdsOfALargerVocabularyAreMappedIntoThisOne) {
  Dataset dataset = Parse(Options("sharegpt"), R"({"output_toks": 5, "input_tok_ids": [5, 99000, 6, 99000, 50, 51]})");
  EXPECT_EQ(CountForeign(dataset, 50), 1);
  std::vector<TokenId> ids = PromptOf(dataset.requests[0], kVocabulary);
  EXPECT_EQ(ids[0], 5);
  EXPECT_EQ(ids[2], 6);
  EXPECT_EQ(ids[1], ids[3]);
  for (TokenId id : ids) EXPECT_LT(id, 50);
}

TEST(ShareGpt, ConversationsAreTokenizedFilteredAndShuffledBySeed) {
  const TokenizeFn by_letter = [](const std::string& text) -> StatusOr<std::vector<TokenId>> {
    return std::vector<TokenId>(text.begin(), text.end());
  };
  auto talk = [](const std::string& question, const std::string& answer) {
    return R"({"conversations": [{"from": "human", "value": ")" + question + R"("}, {"from": "gpt", "value": ")" +
           answer + R"("}]})";
  };
  std::string text = "[" + talk("question 1", "answer") + "," + talk("hi", "too short a question") + "," +
                     talk("a long enough one", "no") + "," + talk(std::string(1025, 'x'), "too long") + "," +
                     R"({"conversations": [{"value": "nobody answered"}]})";
  for (int i = 2; i < 30; ++i) text += "," + talk(StrCat("question ", i), "answer");
  text += "]";
  DatasetOptions options = Options("sharegpt");
  auto dataset = ParseDataset(options, text, by_letter);
  ASSERT_TRUE(dataset.ok()) << dataset.status().ToString();
  std::vector<std::string> prompts;
  for (const LoadRequest& request : dataset->requests) {
    prompts.emplace_back(request.ids.begin(), request.ids.end());
    EXPECT_EQ(request.output_tokens, 6);
  }
  EXPECT_EQ(std::set<std::string>(prompts.begin(), prompts.end()).size(), 29u);
  EXPECT_FALSE(std::is_sorted(prompts.begin(), prompts.end()));
  options.seed = 3;
  EXPECT_NE(ParseDataset(options, text, by_letter)->requests[0].ids, dataset->requests[0].ids);
  EXPECT_THAT(Refusal(options, text), HasSubstr("takes a tokenizer"));
  EXPECT_THAT(Refusal(options, "[1]"), HasSubstr("takes a tokenizer"));
  for (const char* bad : {"[1]", R"([{"conversations": 5}])", R"([{"conversations": [1, 2]}])"}) {
    EXPECT_THAT(ParseDataset(options, bad, by_letter).status().message(), HasSubstr("element 0")) << bad;
  }
}

// --- Files -----------------------------------------------------------------------------------------------------------

TEST(LoadDataset, ReadsPlainAndGzippedFilesAndNamesThem) {
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / "dataset_test";
  std::filesystem::create_directories(folder);
  DatasetOptions options = Options("azure");
  options.path = folder / "plain.csv";
  std::ofstream(options.path) << kAzure;
  EXPECT_EQ(LoadDataset(options, nullptr)->requests.size(), 3u);

  options.path = folder / "packed.csv.gz";
  gzFile file = gzopen(options.path.c_str(), "wb");
  ASSERT_EQ(gzwrite(file, kAzure.data(), static_cast<unsigned>(kAzure.size())), static_cast<int>(kAzure.size()));
  gzclose(file);
  EXPECT_EQ(LoadDataset(options, nullptr)->requests.size(), 3u);

  std::filesystem::resize_file(options.path, std::filesystem::file_size(options.path) - 10);
  EXPECT_EQ(LoadDataset(options, nullptr).status().code(), Code::kDataLoss);
  options.path = folder / "missing.csv";
  EXPECT_EQ(LoadDataset(options, nullptr).status().code(), Code::kNotFound);
  options.path = folder / "bad.csv";
  std::ofstream(options.path) << "x\n";
  EXPECT_THAT(LoadDataset(options, nullptr).status().message(), HasSubstr("bad.csv: line 1"));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace altiplano::bench

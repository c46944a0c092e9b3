// What the tests of several ranks, stages and nodes share: a tiny model, requests that use everything, and comparisons.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/comm/link.h"
#include "server/base/strings.h"
#include "server/engine/engine.h"
#include "server/engine/local_executor.h"
#include "tests/server/engine/engine_testlib.h"

namespace altiplano {

inline LocalExecutorOptions TinyOptions(int ranks) {
  LocalExecutorOptions options;
  options.dtype = DType::kF32;
  options.ranks = ranks;
  options.threads = 2;
  options.token_budget = 48;
  options.max_running = 8;
  options.max_context = 256;
  options.kv_bytes = 16 << 20;
  return options;
}

inline std::unique_ptr<Engine> StartModel(const Checkpoint& checkpoint, LocalExecutorOptions options) {
  auto executor = LocalExecutor::Create(checkpoint, std::move(options));
  EXPECT_TRUE(executor.ok()) << executor.status().ToString();
  EngineOptions engine_options;
  engine_options.scheduler = (*executor)->scheduler_options();
  auto engine = Engine::Start(engine_options, std::move(*executor));
  EXPECT_TRUE(engine.ok()) << engine.status().ToString();
  return std::move(*engine);
}

inline std::unique_ptr<Engine> StartTiny(LocalExecutorOptions options) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  return StartModel(**checkpoint, std::move(options));
}

inline std::shared_ptr<Request> MakeRequest(int index, int prompt_tokens, int max_new_tokens, int vocab = 1792) {
  auto request = std::make_shared<Request>();
  request->id = StrCat("request-", index);
  for (int i = 0; i < prompt_tokens; ++i) request->prompt.push_back((index * 131 + i * 17) % vocab);
  request->sampling.temperature = 0;
  request->sampling.top_logprobs = 3;
  request->stop.max_new_tokens = max_new_tokens;
  request->stop.ignore_eos = true;
  return request;
}

struct Answers {
  std::vector<std::vector<TokenScore>> tokens, prompt_scores;
};

// Chunked prefill beside decode, penalties, prompt scores and siblings: everything that gathers or sends logits round.
inline Answers Ask(Engine& engine, int vocab = 1792) {
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  std::vector<RequestHandle> handles;
  for (int i = 0; i < 6; ++i) {
    auto request = MakeRequest(i, 5 + 23 * i, 20, vocab);
    if (i % 2 == 1) request->sampling.repetition_penalty = 1.3f;
    if (i == 2) request->sampling.prompt_top_logprobs = 2;
    if (i == 4) request->num_sequences = 2;
    sinks.push_back(std::make_shared<CollectingSink>());
    auto handle = engine.Submit(request, sinks.back());
    EXPECT_TRUE(handle.ok());
    handles.push_back(std::move(*handle));
  }
  Answers answers;
  for (auto& sink : sinks) {
    auto& tokens = answers.tokens.emplace_back();
    auto& scores = answers.prompt_scores.emplace_back();
    std::vector<Event> events = sink->WaitForEnd();
    EXPECT_TRUE(events.back().status.ok()) << events.back().status.ToString();
    for (uint32_t sequence = 0; sequence < 2; ++sequence) {
      for (const Event& event : events) {
        if (event.kind == Event::Kind::kToken && event.sequence == sequence) tokens.push_back(event.score);
      }
    }
    for (const Event& event : events) {
      if (event.kind == Event::Kind::kPromptScores) {
        scores.insert(scores.end(), event.prompt_scores.begin(), event.prompt_scores.end());
      }
    }
  }
  return answers;
}

// tolerance 0: bit for bit.
inline void ExpectSame(const std::vector<TokenScore>& a, const std::vector<TokenScore>& b, float tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t t = 0; t < a.size(); ++t) {
    EXPECT_EQ(a[t].token, b[t].token) << t;
    EXPECT_LE(std::abs(a[t].logprob - b[t].logprob), tolerance) << t;
    ASSERT_EQ(a[t].top.size(), b[t].top.size());
    for (size_t k = 0; k < a[t].top.size(); ++k) {
      EXPECT_LE(std::abs(a[t].top[k].logprob - b[t].top[k].logprob), tolerance) << t;
    }
  }
}

inline void ExpectEngineDown(Engine& engine, CollectingSink& sink, const std::string& why) {
  std::vector<Event> events = sink.WaitForEnd();
  EXPECT_EQ(events.back().status.code(), Code::kUnavailable) << events.back().status.ToString();
  EXPECT_EQ(events.back().status.reason(), "ENGINE_DOWN");
  EXPECT_THAT(events.back().status.message(), ::testing::HasSubstr(why));
  ASSERT_NE(events.back().status.detail(), nullptr);
  EXPECT_GT(events.back().status.detail()->retry_after, Duration(0));
  EXPECT_FALSE(engine.healthy());
  auto refused = engine.Submit(MakeRequest(9, 4, 4), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().code(), Code::kUnavailable);
}

// What the ranks of an executor meet in, to be looked at while it lives.
struct Meetings {
  std::vector<Communicator*> communicators;
  std::vector<std::shared_ptr<Link>> links;

  void Watch(LocalExecutorOptions* options) {
    options->wrap_communicator = [this](int, std::unique_ptr<Communicator> rank) {
      communicators.push_back(rank.get());
      return rank;
    };
    options->wrap_link = [this](int, std::shared_ptr<Link> link) {
      links.push_back(link);
      return link;
    };
  }
  // Each for this reason, and soon: not when whoever waits in it has lost patience.
  void ExpectEnded(const std::string& why) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    const auto error = [&](const auto& meeting) {
      while (meeting->error().empty() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      return meeting->error();
    };
    for (const auto* communicator : communicators) EXPECT_THAT(error(communicator), ::testing::HasSubstr(why));
    for (const auto& link : links) EXPECT_THAT(error(link), ::testing::HasSubstr(why));
  }
};

// Lets `victim` hang in its third step, with a short patience. On a loaded machine ranks that do not hang may be late
// for it as well: then the same is tried with twice the patience. why: in the message, after the patience.
inline void ExpectHangIsNoticed(LocalExecutorOptions options, int victim, const std::string& why) {
  auto checkpoint = Checkpoint::Open(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny"));
  ASSERT_TRUE(checkpoint.ok());
  std::string last;
  for (options.patience = std::chrono::milliseconds(200); options.patience < std::chrono::seconds(10);
       options.patience *= 2) {
    std::promise<void> release;
    options.before_step = [victim, released = release.get_future().share()](int rank, uint64_t step) {
      if (rank == victim && step == 3) released.wait();
    };
    auto executor = LocalExecutor::Create(**checkpoint, options);
    last = executor.status().message();
    if (!executor.ok()) continue;
    EngineOptions engine_options;
    engine_options.scheduler = (*executor)->scheduler_options();
    auto engine = std::move(*Engine::Start(engine_options, std::move(*executor)));
    auto sink = std::make_shared<CollectingSink>();
    auto handle = engine->Submit(MakeRequest(0, 10, 100), sink);
    last = sink->WaitForEnd().back().status.message();
    const std::string expected = StrCat("no word for ", options.patience.count(), " ms from ", why);
    const bool noticed = last.find(expected) != std::string::npos;
    if (noticed) ExpectEngineDown(*engine, *sink, expected);
    release.set_value();
    if (noticed) return;
  }
  ADD_FAILURE() << "no patience was long enough to hear of " << why << ": " << last;
}

}  // namespace altiplano

// Checkpoints of random weights in the shapes of published models: for measuring speed and memory, which do not depend
// on what the numbers are, without downloading or storing a model.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "server/base/status.h"
#include "server/model/checkpoint.h"
#include "server/model/config.h"

namespace altiplano {

inline constexpr std::string_view kRandomPrefix = "random:";

struct RandomModel {
  ModelConfig config;
  uint64_t seed = 1;
};

// "random:8b", "random:8b,layers=4,seed=7": a name of PublishedModelConfig and what differs. "random:405b,rank-of=8": a
// model with the heads, ffn rows and vocabulary that each of 8 tensor-parallel ranks has of it, for measuring a rank's
// share where there is one GPU. INVALID_ARGUMENT naming what was found and what is allowed.
StatusOr<RandomModel> ParseRandomModel(std::string_view name);

// Weights are bf16 numbers that a seed and a place alone determine, computed when they are read. Matrices have mean 0
// and variance 1 / columns, so that the layers keep the scale of what they are given; norms lie around 1. The tokenizer
// is RandomTokenizerJson's.
std::unique_ptr<Checkpoint> MakeRandomCheckpoint(const RandomModel& model);

// A tokenizer.json with `vocab` tokens, at least 512: the 256 bytes, made-up words, and last the 256 special tokens of
// Llama 3.1. Any text becomes tokens and back (one for each byte), but not the tokens that a trained tokenizer makes.
std::string RandomTokenizerJson(int64_t vocab);

}  // namespace altiplano

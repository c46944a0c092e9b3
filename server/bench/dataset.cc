#include "server/bench/dataset.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#include "server/base/check.h"
#include "server/base/json.h"
#include "server/base/mix.h"
#include "server/base/split.h"
#include "server/base/strings.h"
#include "server/bench/read_file.h"

namespace altiplano::bench {

namespace {

constexpr int32_t kMooncakeBlock = 512;
constexpr int32_t kDefaultOutputLen = 64;
// What the published ShareGPT benchmarks leave out: too short to say anything, or too long for their models.
constexpr size_t kShareGptMinTokens = 4, kShareGptMaxPrompt = 1024, kShareGptMaxTotal = 2048;
constexpr int32_t kMaxLength = 1 << 24;

// Datasets with the same seed have no prompt in common, or one run would find another's in the prefix cache.
enum class StreamKind : uint64_t { kOwn, kPrefix, kBlock };
uint64_t StreamOf(const DatasetOptions& options, StreamKind kind, uint64_t index) {
  uint64_t bits = Mix(options.seed);
  for (char c : options.name) bits = Mix(bits + static_cast<unsigned char>(c));
  return Mix(Mix(bits + static_cast<uint64_t>(kind)) + index);
}

template <typename... Args>
Status Invalid(const Args&... parts) {
  return Status(Code::kInvalidArgument, StrCat(parts...));
}

// Collects requests until there are enough; knows what all datasets have in common.
class Builder {
 public:
  explicit Builder(const DatasetOptions& options) : options_(options) {}

  bool full() const { return static_cast<int64_t>(dataset_.requests.size()) >= options_.num_prompts; }
  uint64_t next_index() const { return seen_; }
  int32_t Scaled(int32_t tokens) const {
    const double scaled = std::clamp(tokens * options_.length_scale, 1.0, static_cast<double>(kMaxLength));
    return static_cast<int32_t>(std::lround(scaled));
  }
  // How long a trace's answer becomes here.
  int32_t OutputLen(int32_t tokens) const { return options_.output_len.value_or(Scaled(tokens)); }
  void Add(LoadRequest request) {
    ++seen_;
    int64_t total = int64_t{request.input_tokens} + request.output_tokens;
    if (options_.max_tokens > 0 && total > options_.max_tokens) {
      ++dataset_.left_out;
      return;
    }
    dataset_.requests.push_back(std::move(request));
  }
  // A prompt that shares nothing.
  void AddOwn(int32_t input_tokens, int32_t output_tokens, Duration arrival) {
    LoadRequest request;
    request.parts.push_back({StreamOf(options_, StreamKind::kOwn, seen_), input_tokens});
    request.input_tokens = input_tokens;
    request.output_tokens = output_tokens;
    request.arrival = arrival;
    Add(std::move(request));
  }
  StatusOr<Dataset> Finish(bool timed) {
    if (seen_ == 0) return Invalid("there is no request in it");
    if (dataset_.requests.empty()) {
      return Invalid("no request is left: ", dataset_.left_out, " of ", seen_, " were longer than ",
                     options_.max_tokens, " tokens with their answers");
    }
    auto by_arrival = [](const LoadRequest& a, const LoadRequest& b) { return a.arrival < b.arrival; };
    std::stable_sort(dataset_.requests.begin(), dataset_.requests.end(), by_arrival);
    Duration first = dataset_.requests.front().arrival;
    for (LoadRequest& request : dataset_.requests) request.arrival -= first;
    dataset_.timed = timed;
    return std::move(dataset_);
  }

 private:
  const DatasetOptions& options_;
  Dataset dataset_;
  uint64_t seen_ = 0;
};

StatusOr<Dataset> MakeRandom(const DatasetOptions& options) {
  std::mt19937_64 random(Mix(options.seed));
  auto around = [&](int32_t length) {
    auto spread = static_cast<int32_t>(length * options.range_ratio);
    auto range = static_cast<uint64_t>(2 * int64_t{spread} + 1);
    return std::max(1, length - spread + static_cast<int32_t>(random() % range));
  };
  Builder builder(options);
  for (int64_t i = 0; i < options.num_prompts; ++i) {
    LoadRequest request;
    if (options.prefix_len > 0) {
      uint64_t which = builder.next_index() % static_cast<uint64_t>(options.num_prefixes);
      request.parts.push_back({StreamOf(options, StreamKind::kPrefix, which), options.prefix_len});
    }
    request.parts.push_back({StreamOf(options, StreamKind::kOwn, builder.next_index()), around(options.input_len)});
    for (const PromptPart& part : request.parts) request.input_tokens += part.length;
    request.output_tokens = around(options.output_len.value_or(kDefaultOutputLen));
    builder.Add(std::move(request));
  }
  return builder.Finish(/*timed=*/false);
}

// --- CSV -------------------------------------------------------------------------------------------------------------

// Calls visit(line, number) for each line that is not blank, until it returns an error or `enough` says so.
template <typename Visit, typename Enough>
Status ForEachLine(std::string_view text, const Visit& visit, const Enough& enough) {
  for (int64_t number = 1; !text.empty() && !enough(); ++number) {
    size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    RETURN_IF_ERROR(visit(line, number));
  }
  return OkStatus();
}

template <typename T>
std::optional<T> Number(std::string_view text) {
  T value{};
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "2023-11-16 18:15:46.6805900"
std::optional<Duration> Timestamp(std::string_view text) {
  if (text.size() < 19 || text[4] != '-' || text[7] != '-' || text[10] != ' ' || text[13] != ':' || text[16] != ':') {
    return std::nullopt;
  }
  auto year = Number<int>(text.substr(0, 4));
  auto month = Number<unsigned>(text.substr(5, 2)), day = Number<unsigned>(text.substr(8, 2));
  auto hour = Number<int>(text.substr(11, 2)), minute = Number<int>(text.substr(14, 2));
  auto second = Number<double>(text.substr(17));
  if (!year || !month || !day || !hour || !minute || !second || !(*second >= 0 && *second < 61)) return std::nullopt;
  std::chrono::year_month_day date{std::chrono::year(*year), std::chrono::month(*month), std::chrono::day(*day)};
  if (!date.ok() || *year < 1970 || *year > 2200 || *hour < 0 || *minute < 0) return std::nullopt;
  return std::chrono::sys_days(date).time_since_epoch() + std::chrono::hours(*hour) + std::chrono::minutes(*minute) +
         std::chrono::nanoseconds(std::llround(*second * 1e9));
}

StatusOr<Dataset> ParseCsv(const DatasetOptions& options, std::string_view contents) {
  const bool timed = options.name == "azure";
  Builder builder(options);
  std::array<size_t, 3> columns{};  // time, input, output
  size_t num_columns = 0;
  auto find = [](const std::vector<std::string_view>& header, std::string_view name, std::string_view other) {
    auto at = std::find_if(header.begin(), header.end(), [&](auto field) { return field == name || field == other; });
    return static_cast<size_t>(at - header.begin());
  };
  auto read_header = [&](const std::vector<std::string_view>& header) {
    num_columns = header.size();
    columns = {timed ? find(header, "TIMESTAMP", "TIMESTAMP") : 0, find(header, "ContextTokens", "num_prefill_tokens"),
               find(header, "GeneratedTokens", "num_decode_tokens")};
    if (std::find(columns.begin(), columns.end(), num_columns) == columns.end()) return OkStatus();
    return Invalid("line 1 must name the columns ", timed ? "TIMESTAMP, " : "",
                   "ContextTokens (or num_prefill_tokens) and GeneratedTokens (or num_decode_tokens)");
  };
  auto visit = [&](std::string_view line, int64_t number) {
    std::vector<std::string_view> fields = Split(line, ',');
    if (num_columns == 0) return read_header(fields);
    if (fields.size() != num_columns) {
      return Invalid("line ", number, " has ", fields.size(), " fields, the header has ", num_columns);
    }
    auto input = Number<int32_t>(fields[columns[1]]), output = Number<int32_t>(fields[columns[2]]);
    auto time = timed ? Timestamp(fields[columns[0]]) : Duration{};
    if (!time) return Invalid("line ", number, ": the time must look like 2023-11-16 18:15:46.68");
    if (!input || !output || *input < 1 || *output < 1 || *input > kMaxLength || *output > kMaxLength) {
      return Invalid("line ", number, ": token counts must be whole numbers from 1 to ", kMaxLength);
    }
    builder.AddOwn(builder.Scaled(*input), builder.OutputLen(*output), *time);
    return OkStatus();
  };
  RETURN_IF_ERROR(ForEachLine(contents, visit, [&] { return builder.full(); }));
  return builder.Finish(timed);
}

// --- JSON lines ------------------------------------------------------------------------------------------------------

std::optional<int64_t> Integer(const Json& object, const char* key, int64_t min, int64_t max) {
  auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer()) return std::nullopt;
  if (it->is_number_unsigned() && it->get<uint64_t>() > static_cast<uint64_t>(max)) return std::nullopt;
  auto value = it->get<int64_t>();
  return value < min || value > max ? std::nullopt : std::optional(value);
}

bool AreIntegers(const Json& object, const char* key, int64_t max) {
  auto it = object.find(key);
  return it != object.end() && it->is_array() && std::all_of(it->begin(), it->end(), [&](const Json& value) {
           return value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(max);
         });
}

// Visits each line as a JSON object.
template <typename Visit>
Status ForEachObject(std::string_view contents, const Builder& builder, const Visit& visit) {
  return ForEachLine(
      contents,
      [&](std::string_view line, int64_t number) {
        auto object = ParseJson(line);
        if (!object.ok()) return Invalid("line ", number, ": ", object.status().message());
        if (!object->is_object()) return Invalid("line ", number, " must be a JSON object");
        return visit(*object, number);
      },
      [&] { return builder.full(); });
}

StatusOr<Dataset> ParseMooncake(const DatasetOptions& options, std::string_view contents) {
  Builder builder(options);
  const int32_t block = builder.Scaled(kMooncakeBlock);
  auto visit = [&](const Json& object, int64_t number) {
    auto time = Integer(object, "timestamp", 0, int64_t{1} << 40);
    auto input = Integer(object, "input_length", 1, kMaxLength),
         output = Integer(object, "output_length", 1, kMaxLength);
    if (!time || !input || !output || !AreIntegers(object, "hash_ids", INT64_MAX)) {
      return Invalid("line ", number,
                     " must have timestamp (ms), input_length and output_length (whole, from 1) and hash_ids");
    }
    const Json& hashes = object["hash_ids"];
    const int64_t expected = (*input + kMooncakeBlock - 1) / kMooncakeBlock;
    if (static_cast<int64_t>(hashes.size()) != expected) {
      return Invalid("line ", number, " has ", hashes.size(), " hash_ids, ", *input, " tokens are ", expected,
                     " blocks of ", kMooncakeBlock);
    }
    LoadRequest request;
    request.input_tokens = builder.Scaled(static_cast<int32_t>(*input));
    request.output_tokens = builder.OutputLen(static_cast<int32_t>(*output));
    request.arrival = std::chrono::milliseconds(*time);
    int32_t left = request.input_tokens;
    for (size_t i = 0; i < hashes.size() && left > 0; ++i) {
      // Scaled lengths are rounded: the last block takes what is left.
      int32_t length = i + 1 == hashes.size() ? left : std::min(block, left);
      request.parts.push_back({StreamOf(options, StreamKind::kBlock, hashes[i].get<uint64_t>()), length});
      left -= length;
    }
    builder.Add(std::move(request));
    return OkStatus();
  };
  RETURN_IF_ERROR(ForEachObject(contents, builder, visit));
  return builder.Finish(/*timed=*/true);
}

StatusOr<Dataset> ParseTokenLines(const DatasetOptions& options, std::string_view contents) {
  Builder builder(options);
  bool timed = true;
  auto visit = [&](const Json& object, int64_t number) {
    auto output = Integer(object, "output_toks", 1, kMaxLength);
    if (!output || !AreIntegers(object, "input_tok_ids", INT32_MAX) || object["input_tok_ids"].empty()) {
      return Invalid("line ", number, " must have input_tok_ids (token ids) and output_toks (a whole number from 1)");
    }
    auto time = Integer(object, "arrival_time_ns", 0, INT64_MAX);
    timed = timed && time.has_value();
    LoadRequest request;
    request.ids = object["input_tok_ids"].get<std::vector<TokenId>>();
    const auto wanted = static_cast<size_t>(builder.Scaled(static_cast<int32_t>(request.ids.size())));
    if (wanted < request.ids.size()) request.ids.resize(wanted);
    request.input_tokens = static_cast<int32_t>(request.ids.size());
    request.output_tokens = builder.OutputLen(static_cast<int32_t>(*output));
    request.arrival = Duration(time.value_or(0));
    builder.Add(std::move(request));
    return OkStatus();
  };
  RETURN_IF_ERROR(ForEachObject(contents, builder, visit));
  return builder.Finish(timed);
}

// --- Conversations ---------------------------------------------------------------------------------------------------

// The first two turns of each conversation, as prompt and answer; in an order shuffled by the seed.
StatusOr<Dataset> ParseConversations(const DatasetOptions& options, const Json& array, const TokenizeFn& tokenize) {
  if (tokenize == nullptr) {
    return Invalid("holds text, which takes a tokenizer: give a file of token ids (JSON lines with input_tok_ids)");
  }
  std::vector<size_t> order(array.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937_64 random(Mix(options.seed));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);

  Builder builder(options);
  auto turn = [](const Json& turns, size_t i) -> const std::string* {
    auto value = turns[i].is_object() ? turns[i].find("value") : turns[i].end();
    return turns[i].is_object() && value != turns[i].end() && value->is_string() ? value->get_ptr<const std::string*>()
                                                                                 : nullptr;
  };
  for (size_t i : order) {
    if (builder.full()) break;
    auto turns = array[i].is_object() ? array[i].find("conversations") : array[i].end();
    if (!array[i].is_object() || turns == array[i].end() || !turns->is_array()) {
      return Invalid("element ", i, " must be an object with an array \"conversations\"");
    }
    if (turns->size() < 2) continue;
    const std::string *question = turn(*turns, 0), *answer = turn(*turns, 1);
    if (question == nullptr || answer == nullptr)
      return Invalid("element ", i, ": a turn must have a string \"value\"");
    ASSIGN_OR_RETURN(std::vector<TokenId> prompt, tokenize(*question));
    ASSIGN_OR_RETURN(std::vector<TokenId> reply, tokenize(*answer));
    const size_t output = options.output_len ? static_cast<size_t>(*options.output_len) : reply.size();
    if (prompt.size() < kShareGptMinTokens || (!options.output_len && output < kShareGptMinTokens)) continue;
    if (prompt.size() > kShareGptMaxPrompt || prompt.size() + output > kShareGptMaxTotal) continue;
    LoadRequest request;
    request.ids = std::move(prompt);
    const auto wanted = static_cast<size_t>(builder.Scaled(static_cast<int32_t>(request.ids.size())));
    if (wanted < request.ids.size()) request.ids.resize(wanted);
    request.input_tokens = static_cast<int32_t>(request.ids.size());
    request.output_tokens = builder.OutputLen(static_cast<int32_t>(output));
    builder.Add(std::move(request));
  }
  return builder.Finish(/*timed=*/false);
}

StatusOr<Dataset> ParseShareGpt(const DatasetOptions& options, std::string_view contents, const TokenizeFn& tokenize) {
  size_t first = contents.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && contents[first] == '[') {
    ASSIGN_OR_RETURN(Json array, ParseJson(contents));
    return ParseConversations(options, array, tokenize);
  }
  return ParseTokenLines(options, contents);
}

}  // namespace

StatusOr<Dataset> ParseDataset(const DatasetOptions& options, std::string_view contents, const TokenizeFn& tokenize) {
  CHECK(options.num_prompts > 0 && options.num_prefixes > 0 && options.input_len > 0 && options.length_scale > 0);
  if (options.name == "random") return MakeRandom(options);
  if (options.name == "mooncake") return ParseMooncake(options, contents);
  if (options.name == "sharegpt") return ParseShareGpt(options, contents, tokenize);
  CHECK(options.name == "azure" || options.name == "lengths");
  return ParseCsv(options, contents);
}

StatusOr<Dataset> LoadDataset(const DatasetOptions& options, const TokenizeFn& tokenize) {
  if (options.name == "random") return ParseDataset(options, "", tokenize);
  ASSIGN_OR_RETURN(std::string contents, ReadMaybeGzipped(options.path));
  auto dataset = ParseDataset(options, contents, tokenize);
  if (dataset.ok()) return dataset;
  return Status(dataset.status().code(), StrCat(options.path, ": ", dataset.status().message()));
}

int64_t CountForeign(const Dataset& dataset, int32_t vocabulary_size) {
  return std::count_if(dataset.requests.begin(), dataset.requests.end(), [&](const LoadRequest& request) {
    return std::any_of(request.ids.begin(), request.ids.end(), [&](TokenId id) { return id >= vocabulary_size; });
  });
}

std::vector<TokenId> PromptOf(const LoadRequest& request, const Vocabulary& vocabulary) {
  CHECK(vocabulary.size > static_cast<int32_t>(vocabulary.excluded.size()));
  if (!request.ids.empty()) {
    std::vector<TokenId> ids = request.ids;
    for (TokenId& id : ids) {
      if (id >= vocabulary.size) {
        id = static_cast<TokenId>(Mix(static_cast<uint64_t>(id)) % static_cast<uint64_t>(vocabulary.size));
      }
    }
    return ids;
  }
  std::vector<TokenId> ids;
  ids.reserve(static_cast<size_t>(request.input_tokens));
  for (const PromptPart& part : request.parts) {
    for (int32_t i = 0; i < part.length; ++i) {
      uint64_t bits = Mix(part.stream + static_cast<uint64_t>(i));
      auto id = [&] { return static_cast<TokenId>(bits % static_cast<uint64_t>(vocabulary.size)); };
      while (std::find(vocabulary.excluded.begin(), vocabulary.excluded.end(), id()) != vocabulary.excluded.end()) {
        bits = Mix(bits);
      }
      ids.push_back(id());
    }
  }
  return ids;
}

}  // namespace altiplano::bench

#include "tests/server/text/tokenizer_testlib.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <unordered_map>

#include "server/base/strings.h"

namespace altiplano::testing {

std::optional<std::string> ReadFileIfPresent(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

std::string DataPath(std::string_view relative) {
  return StrCat(ALTIPLANO_DATA_DIR, "/", relative);
}

std::vector<Json> ReadJsonLines(const std::string& path) {
  std::vector<Json> rows;
  const auto text = ReadFileIfPresent(path);
  if (!text) return rows;
  for (std::string_view rest = *text; !rest.empty();) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.empty()) continue;
    auto row = ParseJson(line);
    EXPECT_TRUE(row.ok()) << path << ": " << row.status().ToString();
    if (row.ok()) rows.push_back(*std::move(row));
  }
  return rows;
}

std::shared_ptr<const Tokenizer> Llama3OrNull() {
  static const auto tokenizer = []() -> std::shared_ptr<const Tokenizer> {
    const auto file = ReadFileIfPresent(DataPath("tokenizer/tokenizer.model"));
    if (!file) return nullptr;
    auto made = Tokenizer::FromTiktoken(*file);
    EXPECT_TRUE(made.ok()) << made.status().ToString();
    return made.ok() ? *made : nullptr;
  }();
  return tokenizer;
}

std::shared_ptr<const Tokenizer> TinyTokenizer() {
  static const auto tokenizer = [] {
    const auto file = ReadFileIfPresent(StrCat(ALTIPLANO_SOURCE_DIR, "/tests/data/tiny/tokenizer.json"));
    return Tokenizer::FromHuggingFace(file.value()).value();
  }();
  return tokenizer;
}

std::vector<TokenId> Encode(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<TokenId> ids;
  tokenizer.Encode(text, &ids);
  return ids;
}

std::string Decode(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  std::string text;
  for (const TokenId id : ids) text += tokenizer.TokenBytes(id);
  return text;
}

std::string SpellBytes(std::string_view bytes) {
  static const std::vector<std::string> spelling = [] {
    std::vector<std::string> table(256);
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE);
      const uint32_t c = printable ? b : next++;
      if (c < 0x80) {
        table[b] = static_cast<char>(c);
      } else {
        table[b] = {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
      }
    }
    return table;
  }();
  std::string out;
  for (const char c : bytes) out += spelling[static_cast<uint8_t>(c)];
  return out;
}

std::vector<std::string> TiktokenRanks(std::string_view file) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<std::string> ranks;
  while (!file.empty()) {
    const std::string_view line = file.substr(0, file.find('\n'));
    file.remove_prefix(std::min(line.size() + 1, file.size()));
    std::string bytes;
    uint32_t bits = 0, count = 0;
    for (const char c : line.substr(0, line.find_first_of("= "))) {
      bits = bits << 6 | static_cast<uint32_t>(kDigits.find(c));
      if ((count += 6) >= 8) bytes += static_cast<char>(bits >> (count -= 8));
    }
    ranks.push_back(bytes);
  }
  return ranks;
}

std::vector<std::pair<std::string, std::string>> ImpliedMerges(const std::vector<std::string>& ranks) {
  std::unordered_map<std::string_view, size_t> rank_of;
  for (size_t i = 0; i < ranks.size(); ++i) rank_of[ranks[i]] = i;
  std::vector<std::pair<std::string, std::string>> merges;
  for (const std::string_view token : ranks) {
    std::vector<std::pair<size_t, size_t>> splits;
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const auto left = rank_of.find(token.substr(0, cut)), right = rank_of.find(token.substr(cut));
      if (left != rank_of.end() && right != rank_of.end()) splits.emplace_back(left->second, right->second);
    }
    std::sort(splits.begin(), splits.end());
    for (const auto& [left, right] : splits) merges.emplace_back(SpellBytes(ranks[left]), SpellBytes(ranks[right]));
  }
  return merges;
}

std::string MakeTokenizerJson(const std::vector<std::string>& ranks, const std::vector<std::string>& specials,
                              bool merges_as_pairs) {
  OrderedJson file;
  file["added_tokens"] = OrderedJson::array();
  for (size_t i = 0; i < specials.size(); ++i) {
    file["added_tokens"].push_back({{"id", ranks.size() + i}, {"content", specials[i]}, {"special", true}});
  }
  file["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"},
         {"pattern", {{"Regex", std::string(kLlama3SplitRegex)}}},
         {"behavior", "Isolated"},
         {"invert", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}}}}};
  file["decoder"] = {{"type", "ByteLevel"}};
  // By hand: the ordered Json object is linear in its look-ups.
  std::string vocab, merges;
  for (size_t i = 0; i < ranks.size(); ++i) {
    vocab += StrCat(i ? "," : "", Json(SpellBytes(ranks[i])).dump(), ":", i);
  }
  for (const auto& [left, right] : ImpliedMerges(ranks)) {
    if (!merges.empty()) merges += ",\n";
    merges += merges_as_pairs ? StrCat("[", Json(left).dump(), ", ", Json(right).dump(), "]")
                              : Json(left + " " + right).dump();
  }
  std::string text = file.dump();
  text.pop_back();
  return StrCat(text, R"(,"model":{"type":"BPE","ignore_merges":true,"vocab":{)", vocab, R"(},"merges":[)", merges,
                "]}}");
}

namespace {

// Just enough of GGUF v2/v3 to read the metadata of a well-formed file: the real reader is another layer's.
class GgufWalk {
 public:
  explicit GgufWalk(std::ifstream& in) : in_(in) {}

  template <typename T>
  T Read() {
    T value{};
    in_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::string ReadString() {
    std::string s(Read<uint64_t>(), '\0');
    in_.read(s.data(), static_cast<std::streamsize>(s.size()));
    return s;
  }
  std::vector<std::string> ReadStrings() {
    Read<uint32_t>();
    std::vector<std::string> list(Read<uint64_t>());
    for (std::string& s : list) s = ReadString();
    return list;
  }
  std::vector<int32_t> ReadInts() {
    Read<uint32_t>();
    std::vector<int32_t> list(Read<uint64_t>());
    for (int32_t& i : list) i = Read<int32_t>();
    return list;
  }
  void Skip(uint32_t type) {
    constexpr int kSizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == 8) {
      ReadString();
    } else if (type == 9) {
      const auto element = Read<uint32_t>();
      for (auto n = Read<uint64_t>(); n > 0; --n) Skip(element);
    } else {
      in_.ignore(kSizes[type]);
    }
  }

 private:
  std::ifstream& in_;
};

}  // namespace

std::optional<GgufVocabulary> ReadGgufVocabulary(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return std::nullopt;
  GgufWalk walk(in);
  walk.Read<uint64_t>();  // magic, version
  walk.Read<uint64_t>();  // tensors
  GgufVocabulary vocabulary;
  for (auto n = walk.Read<uint64_t>(); n > 0 && in; --n) {
    const std::string key = walk.ReadString();
    const auto type = walk.Read<uint32_t>();
    if (key == "tokenizer.ggml.model") {
      vocabulary.model = walk.ReadString();
    } else if (key == "tokenizer.ggml.pre") {
      vocabulary.pre = walk.ReadString();
    } else if (key == "tokenizer.ggml.tokens") {
      vocabulary.tokens = walk.ReadStrings();
    } else if (key == "tokenizer.ggml.merges") {
      vocabulary.merges = walk.ReadStrings();
    } else if (key == "tokenizer.ggml.token_type") {
      vocabulary.types = walk.ReadInts();
    } else if (key == "tokenizer.ggml.bos_token_id") {
      vocabulary.bos = walk.Read<int32_t>();
    } else if (key == "tokenizer.ggml.add_bos_token") {
      vocabulary.add_bos = walk.Read<uint8_t>() != 0;
    } else {
      walk.Skip(type);
    }
  }
  return vocabulary;
}

}  // namespace altiplano::testing

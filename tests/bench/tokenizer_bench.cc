// How fast text becomes ids, in CPU time of one thread, against tiktoken on the same text in the same rounds. Both must
// give the same ids.
//
// Texts: this project's own pages and sources, and the many scripts of the tokenizer's test vectors.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/text/tokenizer.h"
#include "tests/bench/bench.h"

namespace altiplano::bench {
namespace {

constexpr int kRounds = 15;
constexpr size_t kTextBytes = 2 << 20;

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// All files under `folders` with one of the endings, in order of their names.
std::string Concatenate(const std::vector<std::string>& folders, const std::vector<std::string>& endings) {
  std::vector<std::filesystem::path> paths;
  for (const std::string& folder : folders) {
    for (const auto& entry :
         std::filesystem::recursive_directory_iterator(std::filesystem::path(ALTIPLANO_SOURCE_DIR) / folder)) {
      if (std::find(endings.begin(), endings.end(), entry.path().extension()) != endings.end()) {
        paths.push_back(entry.path());
      }
    }
  }
  std::sort(paths.begin(), paths.end());
  std::string text;
  for (const auto& path : paths) text += ReadFile(path);
  return text;
}

std::string GoldenTexts() {
  std::ifstream lines(std::string(ALTIPLANO_DATA_DIR) + "/tokenizer/golden_encode.jsonl");
  std::string text;
  for (std::string line; std::getline(lines, line);) {
    const auto json = OrderedJson::parse(line, nullptr, false);
    if (json.is_object() && json.contains("text") && json["text"].is_string()) text += json["text"].get<std::string>();
  }
  return text;
}

std::string Repeat(const std::string& text, size_t bytes) {
  std::string all;
  while (!text.empty() && all.size() < bytes) all += text;
  return all;
}

// tests/bench/tiktoken_peer.py as a process of its own, idle between its rounds.
class Peer {
 public:
  Peer(const std::string& python, const std::string& model, const std::string& text_path) {
    int to[2], from[2];
    if (pipe(to) != 0 || pipe(from) != 0) return;
    child_ = fork();
    if (child_ == 0) {
      dup2(to[0], STDIN_FILENO);
      dup2(from[1], STDOUT_FILENO);
      for (int end : {to[0], to[1], from[0], from[1]}) close(end);
      execlp(python.c_str(), python.c_str(), ALTIPLANO_SOURCE_DIR "/tests/bench/tiktoken_peer.py", model.c_str(),
             text_path.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    close(to[0]);
    close(from[1]);
    ask_ = fdopen(to[1], "w");
    answer_ = fdopen(from[0], "r");
    char line[128];
    if (child_ > 0 && std::fgets(line, sizeof(line), answer_) != nullptr) {
      name_ = line;
      name_.pop_back();
    }
  }
  ~Peer() {
    if (ask_ != nullptr) std::fclose(ask_);
    if (answer_ != nullptr) std::fclose(answer_);
    if (child_ > 0) waitpid(child_, nullptr, 0);
  }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  const std::string& name() const { return name_; }  // "": it did not start

  struct Answer {
    double seconds = 0;
    size_t tokens = 0;
    uint32_t checksum = 0;
  };
  std::optional<Answer> Encode() {
    std::fputs("\n", ask_);
    std::fflush(ask_);
    Answer answer;
    if (std::fscanf(answer_, "%lf %zu %u", &answer.seconds, &answer.tokens, &answer.checksum) != 3) return std::nullopt;
    return answer;
  }

 private:
  pid_t child_ = -1;
  FILE* ask_ = nullptr;
  FILE* answer_ = nullptr;
  std::string name_;
};

void Measure(Report& report, const Tokenizer& tokenizer, const std::string& name, const std::string& text,
             const std::string& python, const std::string& model) {
  const std::string path = std::filesystem::temp_directory_path() / StrCat("tokenizer_bench.", getpid());
  std::ofstream(path, std::ios::binary) << text;
  std::optional<Peer> peer;
  if (!python.empty()) peer.emplace(python, model, path);
  if (peer && peer->name().empty()) {
    report.Note("tiktoken did not start: nothing to compare with");
    peer.reset();
  }
  std::vector<double> ours, theirs;
  std::vector<TokenId> ids;
  for (int round = 0; round < kRounds; ++round) {
    ids.clear();
    const double begin = ThreadSeconds();
    tokenizer.Encode(text, &ids);
    ours.push_back(ThreadSeconds() - begin);
    if (!peer) continue;
    const std::optional<Peer::Answer> answer = peer->Encode();
    uint32_t checksum = 0;
    for (TokenId id : ids) checksum = checksum * 31 + static_cast<uint32_t>(id);
    if (!answer || answer->tokens != ids.size() || answer->checksum != checksum) {
      std::fprintf(stderr, "tokenizer_bench: %s: %s gives other ids\n", name.c_str(), peer->name().c_str());
      std::exit(1);
    }
    theirs.push_back(answer->seconds);
  }
  std::filesystem::remove(path);

  auto rate = [&](const std::vector<double>& seconds) {
    return static_cast<double>(text.size()) / *std::min_element(seconds.begin(), seconds.end()) / 1e6;
  };
  Result result;
  result.name = name;
  result.value = rate(ours);
  result.unit = "MB/s";
  result.remark = StrCat(Number(rate(ours) * static_cast<double>(ids.size()) / static_cast<double>(text.size())),
                         " million tokens/s");
  result.extra = {{"bytes", text.size()}, {"tokens", ids.size()}};
  if (peer) {
    result.limit = rate(theirs);
    result.limit_name = peer->name();
    result.median_ratio = MedianRatio({.seconds = theirs, .disturbed = {}}, {.seconds = ours, .disturbed = {}});
    result.at_least = 1;
  }
  report.Add(result);
}

}  // namespace
}  // namespace altiplano::bench

int main(int argc, char** argv) {
  using namespace altiplano;
  using namespace altiplano::bench;
  Report report("tokenizer", argc, argv, {"--tiktoken-python"});
  report.Section("tokenizer of Llama 3, one thread");
  const std::string model = ALTIPLANO_DATA_DIR "/tokenizer/tokenizer.model";
  const std::string file = ReadFile(model);
  if (file.empty()) {
    report.Note("left out: there is no tokenizer.model in ALTIPLANO_DATA_DIR");
    return 0;
  }
  const auto tokenizer = Tokenizer::FromTiktoken(file);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "tokenizer_bench: %s\n", tokenizer.status().ToString().c_str());
    return 1;
  }
  const std::string python = report.option("--tiktoken-python");
  if (python.empty()) report.Note("no --tiktoken-python: nothing to compare with");
  auto measure = [&](const std::string& name, const std::string& text) {
    Measure(report, **tokenizer, name, Repeat(text, kTextBytes), python, model);
  };
  measure("English: this project's pages", Concatenate({"docs"}, {".md"}));
  measure("C++: this project's sources", Concatenate({"server", "kernels"}, {".cc", ".h"}));
  measure("many scripts: the test vectors", GoldenTexts());
}

#include "server/model/hf_folder.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <map>
#include <set>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/model/checkpoint_stored.h"
#include "server/model/checkpoint_tensors.h"
#include "server/model/file_reader.h"
#include "server/model/safetensors.h"

namespace altiplano {

namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;
constexpr uint64_t kMaxIndexBytes = uint64_t{128} << 20;
constexpr uint64_t kMaxTokenizerBytes = uint64_t{256} << 20;
constexpr std::string_view kSingle = "model.safetensors";
constexpr std::string_view kIndex = "model.safetensors.index.json";

std::string Join(const std::string& folder, std::string_view name) {
  return StrCat(folder, folder.ends_with('/') ? "" : "/", name);
}

// The same error with the file's name in front.
Status In(const std::string& file, const Status& status) {
  return Status(status.code(), StrCat(file, ": ", status.message()));
}

class Folder {
 public:
  static StatusOr<Folder> List(const std::string& path) {
    Folder folder(path);
    std::error_code error;
    for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
      folder.names_.insert(it->path().filename().string());
    }
    if (error) return Status(Code::kPermissionDenied, StrCat(path, ": ", error.message()));
    return folder;
  }

  const std::string& path() const { return path_; }
  bool Has(std::string_view name) const { return names_.count(std::string(name)) > 0; }
  std::string At(std::string_view name) const { return Join(path_, name); }
  std::vector<std::string> EndingIn(std::initializer_list<std::string_view> suffixes) const {
    std::vector<std::string> found;
    for (const std::string& name : names_) {
      for (std::string_view suffix : suffixes) {
        if (name.ends_with(suffix)) found.push_back(name);
      }
    }
    return found;
  }
  // "" when there is no such file. An empty one is an error: it says nothing, and something else would be taken for it.
  StatusOr<std::string> ReadIfThere(std::string_view name, uint64_t max_bytes) const {
    if (!Has(name)) return std::string();
    ASSIGN_OR_RETURN(std::string text, ReadWholeFile(At(name), max_bytes));
    if (text.empty()) return InvalidArgument(StrCat(At(name), ": is empty: incomplete download?"));
    return text;
  }

 private:
  explicit Folder(std::string path) : path_(std::move(path)) {}
  std::string path_;
  std::set<std::string> names_;
};

constexpr std::string_view kDownload =
    "get the safetensors files instead: hf download ORG/NAME --include \"*.safetensors\" \"*.json\" --local-dir DIR";

// Says what a folder is that has no config.json or no safetensors.
Status NotAModel(const Folder& folder) {
  auto some = [](const std::vector<std::string>& names) {
    return names.size() == 1 ? names[0] : StrCat(names[0], " and ", names.size() - 1, " more");
  };
  auto pickles = folder.EndingIn({".pth", ".pt", ".bin", ".pkl", ".ckpt"});
  auto ggufs = folder.EndingIn({".gguf"});
  auto safetensors = folder.EndingIn({".safetensors"});
  const std::string& path = folder.path();
  if (safetensors.empty() && !pickles.empty()) {
    return Status(Code::kFailedPrecondition, StrCat(path, ": holds PyTorch pickle files only (", some(pickles),
                                                    "), which can run code and are never opened; ", kDownload));
  }
  if (safetensors.empty() && !ggufs.empty()) {
    return Status(Code::kFailedPrecondition,
                  StrCat(path, ": holds GGUF files (", some(ggufs), "); name the file itself: ", folder.At(ggufs[0])));
  }
  if (!folder.Has("config.json")) {
    return Status(Code::kNotFound, StrCat(path, ": has no config.json: not a Hugging Face model folder",
                                          folder.EndingIn({""}).empty() ? " (it is empty)" : ""));
  }
  if (safetensors.empty()) {
    return Status(Code::kNotFound, StrCat(path, ": has neither ", kSingle, " nor ", kIndex, "; ", kDownload));
  }
  return Status(Code::kNotFound, StrCat(path, ": has neither ", kSingle, " nor ", kIndex, ", only ", some(safetensors),
                                        ": incomplete download?"));
}

// Opens one file and appends its tensors; `listed`: what the index says that it holds (null: there is no index).
Status AddFile(const std::string& path, const std::vector<std::string>* listed, CheckpointParts* parts,
               std::vector<StoredTensor>* found) {
  ASSIGN_OR_RETURN(std::shared_ptr<const ByteSource> file, FileReader::Open(path));
  ASSIGN_OR_RETURN(auto tensors, ReadSafetensorsHeader(*file));
  std::vector<std::string> names;
  for (SafetensorsTensor& tensor : tensors) {
    names.push_back(tensor.name);
    StoredTensor stored;
    stored.info = {std::move(tensor.name), std::move(tensor.dtype), std::move(tensor.shape), tensor.end - tensor.begin,
                   path};
    stored.file = parts->files.size();
    stored.offset = tensor.begin;
    found->push_back(std::move(stored));
  }
  parts->files.push_back(std::move(file));
  if (listed == nullptr) return OkStatus();

  std::sort(names.begin(), names.end());
  std::vector<std::string> missing, extra;
  std::set_difference(listed->begin(), listed->end(), names.begin(), names.end(), std::back_inserter(missing));
  std::set_difference(names.begin(), names.end(), listed->begin(), listed->end(), std::back_inserter(extra));
  if (!missing.empty()) {
    return Status(Code::kInvalidArgument,
                  StrCat(path, ": tensor ", missing[0], ": is missing, but ", kIndex, " puts it here"));
  }
  if (!extra.empty()) {
    return Status(Code::kInvalidArgument,
                  StrCat(path, ": tensor ", extra[0], ": is not expected: ", kIndex, " does not put it here"));
  }
  return OkStatus();
}

Status AddAllFiles(const Folder& folder, CheckpointParts* parts, std::vector<StoredTensor>* found) {
  if (folder.Has(kIndex)) {
    ASSIGN_OR_RETURN(std::string text, ReadWholeFile(folder.At(kIndex), kMaxIndexBytes));
    auto shards = ParseShardIndex(text);
    if (!shards.ok()) return In(folder.At(kIndex), shards.status());
    auto named = [](const ShardNames& shard) { return shard.file == kSingle; };
    if (folder.Has(kSingle) && std::none_of(shards->begin(), shards->end(), named)) {
      return Status(Code::kInvalidArgument, StrCat(folder.path(), ": has both ", kSingle, " and ", kIndex,
                                                   ", which does not mention it: remove the one that is not meant"));
    }
    for (const ShardNames& shard : *shards) {
      if (!folder.Has(shard.file)) {
        return Status(Code::kNotFound, StrCat(folder.At(shard.file), ": is missing, but ", kIndex, " puts ",
                                              shard.tensors.size(), " tensors there: incomplete download?"));
      }
      RETURN_IF_ERROR(AddFile(folder.At(shard.file), &shard.tensors, parts, found));
    }
    return OkStatus();
  }
  if (!folder.Has(kSingle)) return NotAModel(folder);
  return AddFile(folder.At(kSingle), nullptr, parts, found);
}

// Compares a stored head with the embedding to which the config ties it.
Status CheckRedundantHead(const CheckpointParts& parts, const StoredTensor& head) {
  constexpr int64_t kSamples = 64;
  const StoredTensor& embedding = parts.tensors[0];
  auto bad = [&](std::string why) {
    return Status(Code::kInvalidArgument, StrCat(head.info.file, ": tensor ", head.info.name, ": ", why,
                                                 " model.embed_tokens.weight, but config.json says ",
                                                 "tie_word_embeddings: remove the tensor, or set that to false"));
  };
  if (head.info.dtype != embedding.info.dtype) return bad(StrCat("is ", head.info.dtype, " and differs from"));
  const int64_t rows = head.info.shape[0];
  const size_t row_bytes = static_cast<size_t>(head.info.bytes / static_cast<uint64_t>(rows));
  std::string a(row_bytes, '\0'), b(row_bytes, '\0');
  for (int64_t i = 0; i < std::min(rows, kSamples); ++i) {
    const int64_t row = rows <= kSamples ? i : i * (rows - 1) / (kSamples - 1);
    const uint64_t at = static_cast<uint64_t>(row) * row_bytes;
    RETURN_IF_ERROR(parts.files[head.file]->ReadAt(head.offset + at, a.data(), row_bytes));
    RETURN_IF_ERROR(parts.files[embedding.file]->ReadAt(embedding.offset + at, b.data(), row_bytes));
    if (a != b) return bad(StrCat("differs in row ", row, " from"));
  }
  return OkStatus();
}

Status ReadText(const Folder& folder, TextAssets* text) {
  ASSIGN_OR_RETURN(text->tokenizer_json, folder.ReadIfThere("tokenizer.json", kMaxTokenizerBytes));
  ASSIGN_OR_RETURN(text->tiktoken_model, folder.ReadIfThere("tokenizer.model", kMaxTokenizerBytes));
  ASSIGN_OR_RETURN(text->chat_template, folder.ReadIfThere("chat_template.jinja", kMaxConfigBytes));
  if (!text->chat_template.empty()) return OkStatus();  // takes precedence, as in transformers
  for (std::string_view name : {"chat_template.json", "tokenizer_config.json"}) {
    ASSIGN_OR_RETURN(std::string json, folder.ReadIfThere(name, kMaxTokenizerBytes));
    if (json.empty()) continue;
    auto chat_template = ParseChatTemplate(json);
    if (!chat_template.ok()) return In(folder.At(name), chat_template.status());
    text->chat_template = std::move(*chat_template);
    if (!text->chat_template.empty()) return OkStatus();
  }
  return OkStatus();
}

std::string NameOfFolder(const std::string& path) {
  fs::path p = fs::absolute(path).lexically_normal();
  if (!p.has_filename()) p = p.parent_path();
  // In the hub's cache the folder is models--ORG--NAME/snapshots/COMMIT.
  if (p.parent_path().filename() == "snapshots") {
    std::string repository = p.parent_path().parent_path().filename().string();
    if (auto at = repository.rfind("--"); at != repository.npos) return repository.substr(at + 2);
  }
  return p.filename().string();
}

}  // namespace

StatusOr<std::vector<ShardNames>> ParseShardIndex(std::string_view index_json) {
  ASSIGN_OR_RETURN(Json json, ParseJson(index_json));
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object() ||
      json["weight_map"].empty()) {
    return Status(Code::kInvalidArgument,
                  "weight_map is missing or empty, expected an object from tensor to file name");
  }
  std::map<std::string, std::vector<std::string>> files;
  for (const auto& [tensor, file] : json["weight_map"].items()) {  // sorted
    if (!file.is_string()) return Status(Code::kInvalidArgument, StrCat("weight_map of ", tensor, " is not a string"));
    const std::string& name = file.get_ref<const std::string&>();
    if (name.find('/') != name.npos || name.find('\0') != name.npos || !name.ends_with(".safetensors")) {
      return Status(Code::kInvalidArgument, StrCat("weight_map puts ", tensor, " into \"", name,
                                                   "\", expected a file name that ends in .safetensors"));
    }
    files[name].push_back(tensor);
  }
  std::vector<ShardNames> shards;
  for (auto& [file, tensors] : files) shards.push_back({file, std::move(tensors)});
  return shards;
}

StatusOr<std::string> ParseChatTemplate(std::string_view tokenizer_config_json) {
  ASSIGN_OR_RETURN(Json json, ParseJson(tokenizer_config_json));
  if (!json.is_object()) return Status(Code::kInvalidArgument, "is not a JSON object");
  auto it = json.find("chat_template");
  if (it == json.end() || it->is_null()) return std::string();
  if (it->is_string()) return it->get<std::string>();
  if (it->is_array()) {
    for (const Json& entry : *it) {
      auto named = [&](const char* key) { return entry.is_object() && entry.contains(key) && entry[key].is_string(); };
      if (named("name") && named("template") && entry["name"] == "default") return entry["template"].get<std::string>();
    }
  }
  return Status(Code::kInvalidArgument, "chat_template is neither a string nor a list with one named \"default\"");
}

StatusOr<std::unique_ptr<Checkpoint>> OpenHuggingFaceFolder(const std::string& path) {
  ASSIGN_OR_RETURN(Folder folder, Folder::List(path));
  if (!folder.Has("config.json")) return NotAModel(folder);
  CheckpointParts parts;
  parts.path = path;
  parts.format = "safetensors";
  ASSIGN_OR_RETURN(std::string config_json, ReadWholeFile(folder.At("config.json"), kMaxConfigBytes));
  auto config = ParseModelConfig(config_json);
  if (!config.ok()) return In(folder.At("config.json"), config.status());
  parts.config = std::move(*config);
  parts.config.name = NameOfFolder(path);
  ASSIGN_OR_RETURN(std::string generation_json, folder.ReadIfThere("generation_config.json", kMaxConfigBytes));
  auto generation = ParseGenerationDefaults(generation_json, config_json);
  if (!generation.ok()) return In(folder.At("generation_config.json"), generation.status());
  parts.generation = std::move(*generation);

  std::vector<StoredTensor> found;
  RETURN_IF_ERROR(AddAllFiles(folder, &parts, &found));
  ASSIGN_OR_RETURN(Matched matched, MatchTensors(
                                        folder.At(folder.Has(kIndex) ? kIndex : kSingle), parts.config,
                                        [](const std::string& name) { return name; }, std::move(found)));
  parts.tensors = std::move(matched.tensors);
  if (matched.redundant_head) RETURN_IF_ERROR(CheckRedundantHead(parts, *matched.redundant_head));
  RETURN_IF_ERROR(ReadText(folder, &parts.text));
  return std::unique_ptr<Checkpoint>(std::make_unique<StoredCheckpoint>(std::move(parts)));
}

}  // namespace altiplano

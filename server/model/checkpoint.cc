#include "server/model/checkpoint.h"

#include <algorithm>
#include <filesystem>

#include "server/base/strings.h"
#include "server/model/file_reader.h"
#include "server/model/gguf.h"
#include "server/model/gguf_checkpoint.h"
#include "server/model/hf_folder.h"
#include "server/model/random_checkpoint.h"

namespace altiplano {

namespace {

// What was perhaps meant by something that is not there; begins with a semicolon, or is empty.
std::string NotAPath(std::string_view path) {
  if (path.starts_with('~')) return "; a shell replaces ~ at the beginning of a word only: give the whole path";
  const bool like_a_repository =
      std::count(path.begin(), path.end(), '/') == 1 && path.find_first_of("./") != 0 && !path.ends_with('/');
  if (!like_a_repository) return "";
  return StrCat("; nothing is downloaded here: hf download ", path,
                " --include \"*.safetensors\" \"*.json\" --local-dir DIR, and then name DIR");
}

}  // namespace

StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& path) {
  if (path.starts_with(kRandomPrefix)) {
    ASSIGN_OR_RETURN(const RandomModel model, ParseRandomModel(path));
    return MakeRandomCheckpoint(model);
  }
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return OpenHuggingFaceFolder(path);
  auto opened = FileReader::Open(path);
  if (opened.status().code() == Code::kNotFound) {
    return Status(Code::kNotFound, StrCat(opened.status().message(), NotAPath(path)));
  }
  if (!opened.ok()) return opened.status();
  std::shared_ptr<const ByteSource> file = *std::move(opened);
  if (HasGgufMagic(*file)) return OpenGguf(std::move(file));
  if (path.ends_with(".safetensors") || path.ends_with(".json")) {
    return Status(Code::kInvalidArgument, StrCat(path, ": name the folder that holds this file and its config.json"));
  }
  return Status(Code::kInvalidArgument,
                StrCat(path, ": is neither a folder nor a GGUF file (it does not begin with \"GGUF\")"));
}

}  // namespace altiplano

#include "server/model/checkpoint.h"

#include <filesystem>

#include "server/base/strings.h"
#include "server/model/file_reader.h"
#include "server/model/gguf.h"
#include "server/model/gguf_checkpoint.h"
#include "server/model/hf_folder.h"
#include "server/model/random_checkpoint.h"

namespace altiplano {

StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& path) {
  if (path.starts_with(kRandomPrefix)) {
    ASSIGN_OR_RETURN(const RandomModel model, ParseRandomModel(path));
    return MakeRandomCheckpoint(model);
  }
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return OpenHuggingFaceFolder(path);
  ASSIGN_OR_RETURN(std::shared_ptr<const ByteSource> file, FileReader::Open(path));
  if (HasGgufMagic(*file)) return OpenGguf(std::move(file));
  if (path.ends_with(".safetensors") || path.ends_with(".json")) {
    return Status(Code::kInvalidArgument, StrCat(path, ": name the folder that holds this file and its config.json"));
  }
  return Status(Code::kInvalidArgument,
                StrCat(path, ": is neither a folder nor a GGUF file (it does not begin with \"GGUF\")"));
}

}  // namespace altiplano

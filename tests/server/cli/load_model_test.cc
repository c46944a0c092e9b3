#include "server/cli/load_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/cli/config.h"
#include "server/cli/exit_code.h"

namespace altiplano::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

// The tiny model with other texts beside its weights.
class Retexted : public Checkpoint {
 public:
  explicit Retexted(std::string_view format = "safetensors")
      : tiny_(Checkpoint::Open(ALTIPLANO_SOURCE_DIR "/tests/data/tiny").value()),
        format_(format),
        text_(tiny_->text_assets()) {}
  TextAssets& text() { return text_; }

  const std::string& path() const override { return tiny_->path(); }
  std::string_view format() const override { return format_; }
  const ModelConfig& config() const override { return tiny_->config(); }
  const GenerationDefaults& generation_defaults() const override { return tiny_->generation_defaults(); }
  const TextAssets& text_assets() const override { return text_; }
  const std::vector<TensorInfo>& tensors() const override { return tiny_->tensors(); }
  uint64_t total_bytes() const override { return tiny_->total_bytes(); }
  Status Read(std::string_view tensor, int64_t row_begin, int64_t rows, int64_t col_begin, int64_t cols, DType dtype,
              void* out, int64_t out_stride, uint64_t* bytes_read) const override {
    return tiny_->Read(tensor, row_begin, rows, col_begin, cols, dtype, out, out_stride, bytes_read);
  }

 private:
  const std::unique_ptr<Checkpoint> tiny_;
  const std::string format_;
  TextAssets text_;
};

TEST(LoadText, AChatFormatThatWasNamedNeedsItsSpecialTokens) {
  const Retexted tiny;
  const Status status = LoadText(tiny, "chatml").status();
  EXPECT_EQ(status.code(), Code::kOutOfRange) << "a setting, not the files";
  EXPECT_THAT(status.message(),
              HasSubstr("--chat-format chatml: the chat format needs the special token <|im_start|>"));
  for (const std::string_view name : ChatFormat::Names()) {
    const bool has_tokens = name.starts_with("llama") || name.starts_with("vllm");
    EXPECT_EQ(LoadText(tiny, name).ok(), has_tokens) << name;
  }
}

TEST(LoadText, AChatFormatThatWasRecognisedNeedsThemToo) {
  Retexted tiny;
  EXPECT_NE(LoadText(tiny, "auto").value().chat_format, nullptr);
  std::string& json = tiny.text().tokenizer_json;
  const std::string_view token = "<|eot_id|>";
  ASSERT_NE(json.find(token), std::string::npos);
  for (size_t at = 0; (at = json.find(token, at)) != std::string::npos;) json.replace(at, token.size(), "<|eot_ID|>");
  const Status status = LoadText(tiny, "auto").status();
  EXPECT_EQ(status.code(), Code::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("needs the special token <|eot_id|>"));
  EXPECT_THAT(status.message(), HasSubstr("--chat-format none serves plain text"));
  EXPECT_EQ(LoadText(tiny, "none").value().chat_format, nullptr);
}

TEST(LoadText, WithoutATokenizerSaysWhatIsMissing) {
  for (const auto& [format, part] : {std::pair{"safetensors", "there is neither tokenizer.json nor tokenizer.model"},
                                     {"gguf", "metadata tokenizer.ggml.model: is missing"}}) {
    Retexted weights(format);
    weights.text() = {};
    const Status status = LoadText(weights, "auto").status();
    EXPECT_EQ(status.code(), Code::kFailedPrecondition);
    EXPECT_THAT(status.message(), HasSubstr(part));
  }
}

TEST(LoadModel, ARecordThatMemoryHasNoRoomForIsRefusedWithNumbers) {
  const auto file = ParseConfig("model { path: \"" ALTIPLANO_SOURCE_DIR
                                "/tests/data/tiny\" replicas: 2 } log { flight_record_memory: \"1000TiB\" }",
                                "test.textproto");
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const auto config = ResolveConfig(ParsedFlags::Parse({.name = "serve"}, {}).value(), &*file);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  const Status status = LoadModel(config->values, {}).status();
  EXPECT_EQ(ExitCodeOfLoad(status), kExitUnavailable);
  EXPECT_THAT(status.message(), MatchesRegex("--flight-record-memory is 1000.00 TiB.* for each of 2 replicas, but only "
                                             "[0-9.]+ [MG]iB are free; lower it"));
}

}  // namespace
}  // namespace altiplano::cli

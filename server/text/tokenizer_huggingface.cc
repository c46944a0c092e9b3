// tokenizer.json of Hugging Face's `tokenizers`: a byte-level BPE model, its pre-tokenizer, added tokens and the
// post-processor that puts BOS first. What would change ids and is not known here is UNIMPLEMENTED, never ignored.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/base/json.h"
#include "server/base/strings.h"
#include "server/text/bpe_load.h"
#include "server/text/bpe_tokenizer.h"
#include "server/text/tokenizer_json.h"

namespace altiplano {

namespace {

using Kind = BpeVocabulary::Kind;

template <typename... Args>
Status Invalid(const Args&... what) {
  return Status(Code::kInvalidArgument, StrCat(what...));
}

template <typename... Args>
Status Unsupported(const Args&... what) {
  return Status(Code::kUnimplemented, StrCat(what..., " is not supported"));
}

// The two big members stay text; the others are small.
struct File {
  Json top = Json::object();    // without "model"
  Json model = Json::object();  // without "vocab" and "merges"
  std::string_view vocab, merges;
};

StatusOr<File> ReadFile(std::string_view text) {
  if (!IsValidUtf8(text)) return Invalid("not valid JSON: not UTF-8");
  File file;
  JsonCursor in(text);
  Status status;
  const auto keep = [&](std::string_view key, Json* object) {
    const std::string name(key);
    std::string_view span;
    if (!in.SkipValue(&span)) return false;
    auto value = ParseJson(span);
    if (!value.ok()) {
      status = Invalid(name, ": ", value.status().message());
    } else if (object->contains(name)) {
      status = Invalid("not valid JSON: duplicate key ", QuoteToken(name));
    } else {
      (*object)[name] = *std::move(value);
    }
    return status.ok();
  };
  const auto keep_text = [&](std::string_view* span) {
    return span->empty() ? in.SkipValue(span) : in.Fail("vocab or merges given twice");
  };
  const bool read = in.ReadObject([&](std::string_view key) {
    if (key != "model") return keep(key, &file.top);
    return in.ReadObject([&](std::string_view member) {
      if (member == "vocab") return keep_text(&file.vocab);
      if (member == "merges") return keep_text(&file.merges);
      return keep(member, &file.model);
    });
  }) && in.ExpectEnd();
  if (!status.ok()) return status;
  if (!read) return in.status();
  return file;
}

const Json& Member(const Json& object, const char* name) {
  static const Json kNull;
  if (!object.is_object()) return kNull;
  const auto it = object.find(name);
  return it == object.end() ? kNull : *it;
}

// Reads members; the first of a wrong type stays in `wrong`. Absent and null are the same.
struct Fields {
  Status wrong;

  bool Flag(const Json& object, const char* name, bool absent) {
    const Json& value = Member(object, name);
    if (value.is_boolean()) return value.get<bool>();
    Mismatch(value, name, "true or false");
    return absent;
  }
  std::string Text(const Json& object, const char* name) {
    const Json& value = Member(object, name);
    if (value.is_string()) return value.get<std::string>();
    Mismatch(value, name, "a string");
    return "";
  }
  void Mismatch(const Json& value, const char* name, const char* expected) {
    if (!value.is_null() && wrong.ok()) wrong = Invalid(name, " is a ", value.type_name(), ", must be ", expected);
  }
};

Status CheckModel(const Json& model, Fields& fields) {
  const std::string type = fields.Text(model, "type");
  if (type != "BPE" && !Member(model, "type").is_null()) return Unsupported("model.type ", QuoteToken(type));
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!fields.Text(model, name).empty())
      return Unsupported("model.", name, " ", QuoteToken(fields.Text(model, name)));
  }
  if (fields.Flag(model, "byte_fallback", false)) return Unsupported("model.byte_fallback true");
  const Json& dropout = Member(model, "dropout");
  if (dropout.is_number() && dropout.get<double>() != 0) return Unsupported("model.dropout");
  return OkStatus();
}

// Type names of a component, Sequences flattened: one entry each, in order.
Status Flatten(const Json& component, const char* list_name, const char* where, std::vector<Json>* out) {
  Fields fields;
  if (component.is_null()) return OkStatus();
  const std::string type = fields.Text(component, "type");
  if (type.empty()) return Invalid(where, " has no type");
  if (type != "Sequence") {
    out->push_back(component);
    return OkStatus();
  }
  const Json& list = Member(component, list_name);
  if (!list.is_array()) return Invalid(where, ".", list_name, " is not an array");
  for (const Json& element : list) RETURN_IF_ERROR(Flatten(element, list_name, where, out));
  return OkStatus();
}

// Recognises the pre-tokenizers by what they do, not by the model's name.
StatusOr<SplitPattern> ReadPreTokenizer(const Json& top, Fields& fields) {
  std::vector<Json> steps;
  RETURN_IF_ERROR(Flatten(Member(top, "pre_tokenizer"), "pretokenizers", "pre_tokenizer", &steps));
  std::string shape;  // "Split ByteLevel" and so on
  for (const Json& step : steps) {
    const std::string type = fields.Text(step, "type");
    const auto is = [&](const char* name, bool value, bool absent) { return fields.Flag(step, name, absent) == value; };
    if (type == "Split") {
      const std::string regex = fields.Text(Member(step, "pattern"), "Regex");
      if (regex != kLlama3SplitRegex) return Unsupported("pre_tokenizer Split by ", QuoteToken(regex));
      if (fields.Text(step, "behavior") != "Isolated" || !is("invert", false, false)) {
        return Unsupported("pre_tokenizer Split with behavior ", QuoteToken(fields.Text(step, "behavior")),
                           " or invert");
      }
      shape += "Split ";
    } else if (type == "Digits") {
      if (!is("individual_digits", true, false)) return Unsupported("pre_tokenizer Digits without individual_digits");
      shape += "Digits ";
    } else if (type == "ByteLevel") {
      if (!is("add_prefix_space", false, true)) return Unsupported("pre_tokenizer ByteLevel with add_prefix_space");
      shape += is("use_regex", true, true) ? "Gpt2 " : "ByteLevel ";
    } else {
      return Unsupported("pre_tokenizer ", QuoteToken(type));
    }
  }
  if (shape == "Split ByteLevel ") return SplitPattern::kLlama3;
  if (shape == "Digits Gpt2 ") return SplitPattern::kGpt2SingleDigits;
  if (shape == "Gpt2 ") return SplitPattern::kGpt2;
  if (shape.empty()) return Unsupported("pre_tokenizer null");
  return Unsupported("pre_tokenizer ", shape, "as a sequence");  // of names with a blank behind each
}

Status CheckNormalizerAndDecoder(const Json& top, Fields& fields) {
  std::vector<Json> steps;
  RETURN_IF_ERROR(Flatten(Member(top, "normalizer"), "normalizers", "normalizer", &steps));
  if (!steps.empty()) return Unsupported("normalizer ", QuoteToken(fields.Text(steps[0], "type")));
  RETURN_IF_ERROR(Flatten(Member(top, "decoder"), "decoders", "decoder", &steps));
  for (const Json& step : steps) {
    if (fields.Text(step, "type") != "ByteLevel") return Unsupported("decoder ", QuoteToken(fields.Text(step, "type")));
  }
  return OkStatus();
}

struct AddedToken {
  int64_t id;
  std::string text;
  bool special;
};

StatusOr<std::vector<AddedToken>> ReadAddedTokens(const Json& top, Fields& fields) {
  std::vector<AddedToken> added;
  const Json& list = Member(top, "added_tokens");
  if (list.is_null()) return added;
  if (!list.is_array()) return Invalid("added_tokens is not an array");
  for (const Json& entry : list) {
    const Json& id = Member(entry, "id");
    const std::string text = fields.Text(entry, "content");
    const std::string where = StrCat("added_tokens[", added.size(), "]");
    if (!id.is_number_integer() || id.get<double>() >= 1e18) return Invalid(where, " has no integer id");
    if (text.empty()) return Invalid(where, " has no content");
    const bool special = IsSpecialAddedToken(text, fields.Flag(entry, "special", false));
    for (const char* flag : {"lstrip", "rstrip", "single_word"}) {  // of no effect on tokens that text never becomes
      if (!special && fields.Flag(entry, flag, false)) return Unsupported(where, " ", QuoteToken(text), " with ", flag);
    }
    added.push_back({id.get<int64_t>(), text, special});
  }
  return added;
}

Status ReadVocabulary(std::string_view text, BpeTables* tables) {
  Status status;
  JsonCursor in(text);
  std::string spelled;
  const bool read = in.ReadObject([&](std::string_view key) {
    spelled = key;
    int64_t id = 0;
    if (!in.ReadInteger(&id)) return in.Fail(StrCat("token ", QuoteToken(spelled)));
    const bool is_added = id >= 0 && id < tables->vocabulary.size() &&  // special tokens may be listed here too
                          tables->vocabulary.Bytes(static_cast<TokenId>(id)) == spelled;
    if (!is_added) status = AddSpelledToken(id, spelled, tables);
    return status.ok();
  });
  if (status.ok() && !read) status = in.status();
  if (!status.ok()) return Invalid("model.vocab: ", status.message());
  return OkStatus();
}

StatusOr<BpeMerges> ReadMerges(std::string_view text, const BpeVocabulary& vocabulary) {
  JsonCursor counter(text);
  size_t count = 0;
  std::string_view ignored;
  if (!counter.ReadArray([&] { return ++count, counter.SkipValue(&ignored); })) {
    return Invalid("model.merges: ", counter.status().message());
  }
  JsonCursor in(text);
  MergeLoader merges(count, vocabulary);
  Status status;
  std::string left;
  const bool read = in.ReadArray([&] {
    std::string_view word;
    if (in.Accept('[')) {  // ["left", "right"], since tokenizers 0.20
      if (!in.ReadString(&word)) return false;
      left = word;
      if (!in.Expect(',') || !in.ReadString(&word) || !in.Expect(']')) return false;
      status = merges.Add(left, word);
    } else {
      if (!in.ReadString(&word)) return false;
      status = merges.Add(word);
    }
    return status.ok();
  });
  if (status.ok() && !read) status = Invalid("model.merges: ", in.status().message());
  if (!status.ok()) return Invalid("model.", status.message());
  return std::move(merges).Finish();
}

// The token that TemplateProcessing puts before a single sequence, which is BOS.
StatusOr<std::optional<TokenId>> ReadBos(const Json& top, const BpeVocabulary& vocabulary, Fields& fields) {
  std::vector<Json> steps;
  RETURN_IF_ERROR(Flatten(Member(top, "post_processor"), "processors", "post_processor", &steps));
  std::optional<TokenId> bos;
  for (const Json& step : steps) {
    const std::string type = fields.Text(step, "type");
    if (type == "ByteLevel") continue;  // moves offsets only
    if (type != "TemplateProcessing") return Unsupported("post_processor ", QuoteToken(type));
    const Json& single = Member(step, "single");
    if (!single.is_array() || single.empty()) return Invalid("post_processor.single is not an array");
    const std::string name = fields.Text(Member(single[0], "SpecialToken"), "id");
    if (name.empty()) continue;
    const Json& ids = Member(Member(Member(step, "special_tokens"), name.c_str()), "ids");
    if (!ids.is_array() || ids.size() != 1 || !ids[0].is_number_integer()) {
      return Invalid("post_processor.special_tokens has no single id for ", QuoteToken(name));
    }
    const double id = ids[0].get<double>();
    if (id < 0 || id >= vocabulary.size() || vocabulary.kind(ids[0].get<TokenId>()) == Kind::kNone) {
      return Invalid("post_processor puts ", QuoteToken(name), " first, whose id is no token");
    }
    bos = ids[0].get<TokenId>();
  }
  return bos;
}

}  // namespace

StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::FromHuggingFace(std::string_view text) {
  ASSIGN_OR_RETURN(const File file, ReadFile(text));
  Fields fields;
  RETURN_IF_ERROR(CheckModel(file.model, fields));
  RETURN_IF_ERROR(CheckNormalizerAndDecoder(file.top, fields));
  if (file.vocab.empty()) return Invalid("model.vocab is missing");
  if (file.merges.empty()) return Invalid("model.merges is missing");

  BpeTables tables;
  ASSIGN_OR_RETURN(tables.split, ReadPreTokenizer(file.top, fields));
  tables.whole_pieces_first = fields.Flag(file.model, "ignore_merges", false);
  tables.vocabulary = BpeVocabulary(file.vocab.size() / 16);
  ASSIGN_OR_RETURN(const std::vector<AddedToken> added, ReadAddedTokens(file.top, fields));
  for (const AddedToken& token : added) {
    if (token.special) RETURN_IF_ERROR(AddAddedToken(token.id, token.text, true, &tables));
  }
  RETURN_IF_ERROR(ReadVocabulary(file.vocab, &tables));
  for (const AddedToken& token : added) {
    const TokenId as_text = tables.vocabulary.Find(token.text);
    if (token.special && as_text >= 0) {
      return Invalid("special token ", QuoteToken(token.text), " has id ", token.id, ", but ", as_text,
                     " in model.vocab");
    }
    if (!token.special) RETURN_IF_ERROR(AddAddedToken(token.id, token.text, false, &tables));
  }
  ASSIGN_OR_RETURN(tables.merges, ReadMerges(file.merges, tables.vocabulary));
  ASSIGN_OR_RETURN(tables.bos, ReadBos(file.top, tables.vocabulary, fields));
  RETURN_IF_ERROR(fields.wrong);
  return BpeTokenizer::Make(std::move(tables));
}

}  // namespace altiplano

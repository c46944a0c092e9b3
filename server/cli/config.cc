#include "server/cli/config.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

#include <algorithm>

#include "server/base/check.h"
#include "server/base/read_file.h"
#include "server/base/strings.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

namespace pb = google::protobuf;
using config::v1::ServerConfig;

constexpr size_t kMaxFileBytes = 1 << 20;

// The nearest field name to the one that TextFormat says it does not know, as "; did you mean x?".
std::string FieldSuggestion(std::string_view message) {
  constexpr std::string_view kBegin = "Message type \"", kMiddle = "\" has no field named \"";
  size_t middle = message.find(kMiddle);
  if (!message.starts_with(kBegin) || middle == std::string_view::npos) return "";
  std::string type(message.substr(kBegin.size(), middle - kBegin.size()));
  std::string_view field = message.substr(middle + kMiddle.size());
  field = field.substr(0, field.find('"'));
  const pb::Descriptor* descriptor = pb::DescriptorPool::generated_pool()->FindMessageTypeByName(type);
  if (descriptor == nullptr) return "";
  std::vector<std::string_view> names;
  for (int i = 0; i < descriptor->field_count(); ++i) names.push_back(descriptor->field(i)->name());
  std::string_view nearest = Nearest(field, names);
  if (!nearest.empty()) return StrCat("; did you mean ", nearest, "?");
  std::string all;
  for (std::string_view name : names) all += StrCat(all.empty() ? "" : ", ", name);
  return StrCat("; there are ", all);
}

// Keeps the first complaint: those after it are often its echoes.
class FirstError : public pb::io::ErrorCollector {
 public:
  void AddError(int line, pb::io::ColumnNumber column, const std::string& message) override {
    if (!message_.empty()) return;
    line_ = line + 1, column_ = column + 1, message_ = message + FieldSuggestion(message);
  }
  void AddWarning(int, pb::io::ColumnNumber, const std::string&) override {}
  std::string ToString(const std::string& file) const {
    return StrCat(file, ":", std::max(line_, 1), ":", std::max(column_, 1), ": ", message_);
  }

 private:
  int line_ = 0, column_ = 0;
  std::string message_;
};

// A scalar field of ServerConfig by its dotted path.
struct Place {
  pb::Message* parent = nullptr;
  const pb::FieldDescriptor* field = nullptr;
};

Place Locate(ServerConfig* config, std::string_view path) {
  pb::Message* message = config;
  for (;;) {
    size_t dot = path.find('.');
    const pb::FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(std::string(path.substr(0, dot)));
    CHECK(field != nullptr);  // the table names only fields that exist; a test walks it
    if (dot == std::string_view::npos) return {message, field};
    message = message->GetReflection()->MutableMessage(message, field);
    path.remove_prefix(dot + 1);
  }
}

// `value` has passed CheckValue.
void Set(ServerConfig* config, const Flag& flag, const std::string& value) {
  auto [parent, field] = Locate(config, flag.field);
  const pb::Reflection* reflection = parent->GetReflection();
  switch (field->cpp_type()) {
    case pb::FieldDescriptor::CPPTYPE_BOOL:
      reflection->SetBool(parent, field, ParseBool(value).value());
      return;
    case pb::FieldDescriptor::CPPTYPE_UINT32:
      reflection->SetUInt32(parent, field, static_cast<uint32_t>(ParseCount(value, flag.min, flag.max).value()));
      return;
    case pb::FieldDescriptor::CPPTYPE_UINT64:
      reflection->SetUInt64(parent, field, static_cast<uint64_t>(ParseCount(value, flag.min, flag.max).value()));
      return;
    case pb::FieldDescriptor::CPPTYPE_STRING:
      reflection->SetString(parent, field, value);
      return;
    default:
      CHECK(!"a field of a type that the table does not know");
  }
}

std::string Get(ServerConfig* config, const Flag& flag) {
  auto [parent, field] = Locate(config, flag.field);
  const pb::Reflection* reflection = parent->GetReflection();
  switch (field->cpp_type()) {
    case pb::FieldDescriptor::CPPTYPE_BOOL:
      return reflection->GetBool(*parent, field) ? "true" : "false";
    case pb::FieldDescriptor::CPPTYPE_UINT32:
      return std::to_string(reflection->GetUInt32(*parent, field));
    case pb::FieldDescriptor::CPPTYPE_UINT64:
      return std::to_string(reflection->GetUInt64(*parent, field));
    default:
      return reflection->GetString(*parent, field);
  }
}

void CollectPlaces(const pb::Message& message, pb::TextFormat::ParseInfoTree& tree, const std::string& prefix,
                   const std::string& file, std::map<std::string, std::string>* places) {
  std::vector<const pb::FieldDescriptor*> set;
  message.GetReflection()->ListFields(message, &set);
  for (const pb::FieldDescriptor* field : set) {
    if (field->cpp_type() == pb::FieldDescriptor::CPPTYPE_MESSAGE) {
      if (auto* nested = tree.GetTreeForNested(field, -1)) {
        CollectPlaces(message.GetReflection()->GetMessage(message, field), *nested, StrCat(prefix, field->name(), "."),
                      file, places);
      }
      continue;
    }
    auto place = tree.GetLocation(field, -1);
    (*places)[prefix + field->name()] = StrCat(file, ":", place.line + 1, ":", place.column + 1);
  }
}

}  // namespace

StatusOr<ConfigFile> ParseConfig(std::string_view text, const std::string& file_name) {
  if (text.size() > kMaxFileBytes) {
    return Status(Code::kInvalidArgument, StrCat(file_name, ": ", HumanBytes(text.size()), ", more than 1 MiB"));
  }
  ConfigFile file;
  FirstError error;
  pb::TextFormat::ParseInfoTree tree;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.WriteLocationsTo(&tree);
  parser.SetRecursionLimit(16);
  if (!parser.ParseFromString(std::string(text), &file.values)) {
    return Status(Code::kInvalidArgument, error.ToString(file_name));
  }
  CollectPlaces(file.values, tree, "", file_name, &file.places);
  for (const Flag& flag : Settings()) {
    auto place = file.places.find(std::string(flag.field));
    if (place == file.places.end()) continue;
    std::string value = Get(&file.values, flag);
    if (Status bad = CheckValue(flag, value); !bad.ok()) {
      return Status(Code::kInvalidArgument,
                    StrCat(place->second, ": ", flag.field, " is ", Quote(value), ", ", bad.message()));
    }
  }
  return file;
}

StatusOr<EffectiveConfig> ResolveConfig(const ParsedFlags& flags, const ConfigFile* file) {
  EffectiveConfig effective;
  if (file != nullptr) effective.values = file->values;
  for (const Flag& flag : Settings()) {
    std::string field(flag.field);
    std::string& origin = effective.origins[field];
    if (flags.has(flag.name) && flags.given(flag.name)) {
      Set(&effective.values, flag, flags.text(flag.name));
      origin = StrCat("--", flag.name);
    } else if (file != nullptr && file->places.count(field) != 0) {
      origin = file->places.at(field);
    } else {
      Set(&effective.values, flag, std::string(flag.default_value));
      origin = "default";
    }
  }
  // What no single value shows.
  auto block = effective.values.kv().block_size();
  if ((block & (block - 1)) != 0) {
    const std::string& origin = effective.origins["kv.block_size"];
    return Status(Code::kInvalidArgument, StrCat(origin, origin.starts_with("--") ? "" : ": kv.block_size", " is ",
                                                 block, ", must be a power of two"));
  }
  if (const std::string& listen = effective.values.listen();
      listen == effective.values.admin_listen() && (listen.starts_with("unix:") || !listen.ends_with(":0"))) {
    return Status(Code::kInvalidArgument, StrCat(effective.origins["admin_listen"], ": is ", listen,
                                                 ", as --listen is: each needs an address of its own"));
  }
  return effective;
}

StatusOr<EffectiveConfig> ResolveConfig(const ParsedFlags& flags) {
  if (!flags.has("config") || !flags.given("config")) return ResolveConfig(flags, nullptr);
  std::string path = flags.text("config");
  auto text = ReadFile(path, kMaxFileBytes);
  if (!text.ok()) return Status(text.status().code(), StrCat("--config: ", text.status().message()));
  ASSIGN_OR_RETURN(ConfigFile file, ParseConfig(*text, path));
  return ResolveConfig(flags, &file);
}

std::string PrintConfig(const EffectiveConfig& config) {
  std::string out;
  ServerConfig values = config.values;
  std::string_view open;  // the message whose braces are open
  for (const Flag& flag : Settings()) {
    size_t dot = flag.field.find('.');
    std::string_view message = dot == std::string_view::npos ? "" : flag.field.substr(0, dot);
    if (message != open) {
      if (!open.empty()) out += "}\n";
      if (!message.empty()) out += StrCat(message, " {\n");
      open = message;
    }
    std::string value = Get(&values, flag);
    bool quoted = Locate(&values, flag.field).field->cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING;
    if (quoted) value = Quote(value);
    std::string line = StrCat(open.empty() ? "" : "  ",
                              dot == std::string_view::npos ? flag.field : flag.field.substr(dot + 1), ": ", value);
    if (line.size() < 44) line.resize(44, ' ');
    out += StrCat(line, "  # ", config.origins.at(std::string(flag.field)), "\n");
  }
  if (!open.empty()) out += "}\n";
  return out;
}

}  // namespace altiplano::cli

#include "server/cli/flags.h"

#include <algorithm>
#include <array>
#include <utility>

#include "server/base/check.h"
#include "server/base/strings.h"
#include "server/cli/units.h"

namespace altiplano::cli {

namespace {

const Flag* FindFlag(std::span<const Flag> flags, std::string_view name) {
  for (const Flag& flag : flags) {
    if (flag.name == name || (!flag.alias.empty() && flag.alias == name)) return &flag;
  }
  return nullptr;
}

// What other servers' users write, and the flag that is nearest to it here. Those that are only spelled otherwise are
// found without this.
struct Elsewhere {
  std::string_view name, flag, write;
};
constexpr std::array kElsewhere = {
    Elsewhere{"host", "listen", "--listen HOST:PORT"},
    Elsewhere{"port", "listen", "--listen HOST:PORT"},
    Elsewhere{"uds", "listen", "--listen unix:/path"},
    Elsewhere{"m", "model", "--model PATH"},
    Elsewhere{"model-path", "model", "--model PATH"},
    Elsewhere{"hf-repo", "model", "--model PATH (nothing is downloaded)"},
    Elsewhere{"alias", "served-model-name", "--served-model-name NAME"},
    Elsewhere{"chat-template", "chat-format", "--chat-format NAME"},
    Elsewhere{"ctx-size", "max-model-len", "--max-model-len N"},
    Elsewhere{"gpu-memory-utilization", "kv-memory", "--kv-memory SIZE (without it, nearly all that is free)"},
    Elsewhere{"mem-fraction-static", "kv-memory", "--kv-memory SIZE (without it, nearly all that is free)"},
    Elsewhere{"n-gpu-layers", "device", "--device cuda"},
    Elsewhere{"ngl", "device", "--device cuda"},
    Elsewhere{"enforce-eager", "cuda-graphs", "--cuda-graphs off"},
    Elsewhere{"parallel", "max-num-seqs", "--max-num-seqs N"},
    Elsewhere{"np", "max-num-seqs", "--max-num-seqs N"},
    Elsewhere{"max-batch-size", "max-num-seqs", "--max-num-seqs N"},
    Elsewhere{"batch-size", "max-num-batched-tokens", "--max-num-batched-tokens N"},
    Elsewhere{"ubatch-size", "max-num-batched-tokens", "--max-num-batched-tokens N"},
    Elsewhere{"max-prefill-tokens", "max-num-batched-tokens", "--max-num-batched-tokens N"},
    Elsewhere{"n-predict", "max-tokens", "--max-tokens N"},
    Elsewhere{"temp", "temperature", "--temperature X"},
    Elsewhere{"p", "prompt", "--prompt TEXT"},
    Elsewhere{"system-prompt", "system", "--system TEXT"},
};

// dashes: as they were given.
Status UnknownFlag(const Command& command, std::string_view dashes, std::string_view name) {
  const std::string what = StrCat("unknown flag ", dashes, name, "; ");
  for (const Elsewhere& elsewhere : kElsewhere) {
    if (elsewhere.name == name && FindFlag(command.flags, elsewhere.flag) != nullptr) {
      return InvalidArgument(StrCat(what, "here it is ", elsewhere.write));
    }
  }
  std::vector<std::string_view> names = {"help"};
  for (const Flag& flag : command.flags) {
    names.push_back(flag.name);
    if (!flag.alias.empty()) names.push_back(flag.alias);
  }
  std::string_view nearest = Nearest(name, names);
  std::string hint =
      nearest.empty() ? StrCat("see altiplano ", command.name, " --help") : StrCat("did you mean --", nearest, "?");
  return InvalidArgument(what + hint);
}

// Choices that take more than this are listed below the meaning.
constexpr size_t kMostInHead = 64;

std::string_view Placeholder(const Flag& flag) {
  switch (flag.type) {
    case FlagType::kText:
      return "TEXT";
    case FlagType::kPath:
      return "PATH";
    case FlagType::kAddress:
      return "HOST:PORT";
    case FlagType::kUrl:
      return "URL";
    case FlagType::kBool:
      return "";
    case FlagType::kCount:
    case FlagType::kSeed:
      return "N";
    case FlagType::kReal:
      return "X";
    case FlagType::kBytes:
      return "SIZE";
    case FlagType::kDuration:
      return "TIME";
    case FlagType::kChoice:
      return flag.choices.size() > kMostInHead ? "NAME" : flag.choices;
  }
  return "";
}

void AppendWrapped(std::string& out, std::string_view text, size_t indent, size_t width) {
  size_t column = 0;
  while (!text.empty()) {
    size_t space = text.find(' ');
    std::string_view word = text.substr(0, space);
    text.remove_prefix(space == std::string_view::npos ? text.size() : space + 1);
    if (column > 0 && column + 1 + word.size() > width - indent) {
      out += '\n';
      column = 0;
    }
    out += column == 0 ? std::string(indent, ' ') : " ";
    column += word.size() + (column == 0 ? 0 : 1);
    out += word;
  }
  out += '\n';
}

void AppendFlag(std::string& out, const Flag& flag) {
  std::string head =
      StrCat("  --", flag.type == FlagType::kBool && flag.default_value == "true" ? "[no-]" : "", flag.name);
  if (auto placeholder = Placeholder(flag); !placeholder.empty()) head += StrCat(" ", placeholder);
  if (!flag.alias.empty()) head += StrCat("   (also --", flag.alias, ")");
  out += head + "\n";
  AppendWrapped(out, flag.meaning, 6, 100);
  if (flag.choices.size() > kMostInHead) {
    std::string list = "One of: ";
    for (char c : flag.choices) list += c == '|' ? ", " : std::string(1, c);
    AppendWrapped(out, list, 6, 100);
  }
  std::string facts;
  auto fact = [&facts](std::string_view key, std::string_view value) {
    facts += StrCat(facts.empty() ? "" : "   ", key, " ", value);
  };
  if (flag.type != FlagType::kBool || flag.default_value == "true") {
    fact("default", flag.default_value.empty() ? "none" : flag.default_value);
  }
  if (!flag.example.empty()) fact("example", StrCat("--", flag.name, " ", flag.example));
  if (flag.type == FlagType::kCount && flag.min > 0) fact("at least", StrCat(flag.min));
  if (flag.least != "0") fact("at least", flag.least);
  if (flag.repeated) fact("may be", "repeated");
  if (!flag.field.empty()) fact("config", flag.field);
  if (!facts.empty()) out += StrCat("      ", facts, "\n");
}

// What others call a choice, where the nearest one by spelling would be another.
constexpr std::pair<std::string_view, std::string_view> kOtherNames[] = {
    {"gpu", "cuda"}, {"nvidia", "cuda"}, {"bfloat16", "bf16"}};

}  // namespace

Status CheckValue(const Flag& flag, std::string_view value) {
  switch (flag.type) {
    case FlagType::kText:
      return IsValidUtf8(value) ? OkStatus() : InvalidArgument("is not valid UTF-8");
    case FlagType::kPath:
      if (value.find('\0') != std::string_view::npos) return InvalidArgument("has a NUL byte");
      return IsValidUtf8(value) ? OkStatus() : InvalidArgument("is not valid UTF-8");
    case FlagType::kAddress:
      return value.empty() ? OkStatus() : CheckAddress(value);
    case FlagType::kUrl:
      return CheckUrl(value);
    case FlagType::kBool:
      return ParseBool(value).status();
    case FlagType::kCount:
      return ParseCount(value, flag.min, flag.max).status();
    case FlagType::kSeed:
      return ParseSeed(value).status();
    case FlagType::kReal:
      return ParseReal(value).status();
    case FlagType::kBytes: {
      ASSIGN_OR_RETURN(const uint64_t bytes, ParseBytes(value));
      return bytes >= CheckedBytes(flag.least) ? OkStatus() : InvalidArgument(StrCat("must be at least ", flag.least));
    }
    case FlagType::kDuration: {
      ASSIGN_OR_RETURN(const Duration time, ParseDuration(value));
      return time >= CheckedDuration(flag.least) ? OkStatus()
                                                 : InvalidArgument(StrCat("must be at least ", flag.least));
    }
    case FlagType::kChoice:
      break;
  }
  std::vector<std::string_view> names;
  for (std::string_view rest = flag.choices; !rest.empty();) {
    size_t bar = std::min(rest.find('|'), rest.size());
    names.push_back(rest.substr(0, bar));
    rest.remove_prefix(std::min(bar + 1, rest.size()));
  }
  if (std::find(names.begin(), names.end(), value) != names.end()) return OkStatus();
  std::string_view nearest = Nearest(value, names);
  for (const auto& [other, name] : kOtherNames) {
    if (value == other && std::find(names.begin(), names.end(), name) != names.end()) nearest = name;
  }
  return InvalidArgument(
      StrCat("must be one of ", flag.choices, nearest.empty() ? "" : StrCat("; did you mean ", nearest, "?")));
}

StatusOr<ParsedFlags> ParsedFlags::Parse(const Command& command, std::span<const std::string_view> arguments) {
  ParsedFlags parsed;
  parsed.flags_ = command.flags;
  bool flags_ended = false;
  const Flag* before = nullptr;  // the switch that the argument before this one was
  for (size_t i = 0; i < arguments.size(); ++i) {
    std::string_view argument = arguments[i];
    const Flag* const last_switch = std::exchange(before, nullptr);
    if (flags_ended || !argument.starts_with('-') || argument == "-") {
      if (parsed.positional_.size() == command.max_positional && last_switch != nullptr && ParseBool(argument).ok()) {
        return InvalidArgument(StrCat("--", last_switch->name, " takes its value with an equals sign: --",
                                      last_switch->name, "=", argument));
      }
      if (parsed.positional_.size() == command.max_positional) {
        const bool a_model = parsed.has("model") && !parsed.given("model") && command.max_positional == 0;
        return InvalidArgument(StrCat("unexpected argument ", Quote(argument), "; ",
                                      a_model ? "a model is named with --model, " : "", "see altiplano ", command.name,
                                      " --help"));
      }
      parsed.positional_.emplace_back(argument);
      continue;
    }
    if (argument == "--") {
      flags_ended = true;
      continue;
    }
    if (argument == "--help" || argument == "-h") {
      parsed.help_ = true;
      continue;
    }
    const std::string_view dashes = argument.substr(0, argument.starts_with("--") ? 2 : 1);
    std::string_view name = argument.substr(dashes.size());
    size_t equals = name.find('=');
    bool has_value = equals != std::string_view::npos;
    std::string value(has_value ? name.substr(equals + 1) : "");
    name = name.substr(0, equals);
    const Flag* flag = argument.starts_with("--") ? FindFlag(parsed.flags_, name) : nullptr;
    if (flag == nullptr && name.starts_with("no-") && argument.starts_with("--") && !has_value) {
      flag = FindFlag(parsed.flags_, name.substr(3));
      if (flag != nullptr && flag->type != FlagType::kBool) flag = nullptr;
      if (flag != nullptr) value = "false", has_value = true;
    }
    if (flag == nullptr) return UnknownFlag(command, dashes, name);
    if (!has_value && flag->type == FlagType::kBool) {
      value = "true";
      before = flag;
    } else if (!has_value) {
      if (++i == arguments.size())
        return InvalidArgument(StrCat("--", name, " needs a value (", Placeholder(*flag), ")"));
      value = arguments[i];
    }
    if (Status bad = CheckValue(*flag, value); !bad.ok()) {
      return InvalidArgument(StrCat("--", name, " is ", Quote(value), ", ", bad.message()));
    }
    auto& values = parsed.values_[flag->name];
    if (!values.empty() && !flag->repeated) return InvalidArgument(StrCat("--", flag->name, " is given twice"));
    values.push_back(std::move(value));
  }
  return parsed;
}

bool ParsedFlags::has(std::string_view name) const {
  return FindFlag(flags_, name) != nullptr;
}

const Flag& ParsedFlags::Find(std::string_view name) const {
  const Flag* flag = FindFlag(flags_, name);
  CHECK(flag != nullptr);
  return *flag;
}

std::string ParsedFlags::text(std::string_view name) const {
  const Flag& flag = Find(name);
  auto found = values_.find(flag.name);
  return found == values_.end() ? std::string(flag.default_value) : found->second.back();
}

std::vector<std::string> ParsedFlags::all(std::string_view name) const {
  auto found = values_.find(Find(name).name);
  return found == values_.end() ? std::vector<std::string>() : found->second;
}

int64_t ParsedFlags::count(std::string_view name) const {
  const Flag& flag = Find(name);
  return ParseCount(text(name), flag.min, flag.max).value();
}
uint64_t ParsedFlags::seed(std::string_view name) const {
  return ParseSeed(text(name)).value();
}
double ParsedFlags::real(std::string_view name) const {
  return ParseReal(text(name)).value();
}
bool ParsedFlags::boolean(std::string_view name) const {
  return ParseBool(text(name)).value();
}
uint64_t ParsedFlags::bytes(std::string_view name) const {
  return ParseBytes(text(name)).value();
}
Duration ParsedFlags::duration(std::string_view name) const {
  return ParseDuration(text(name)).value();
}

std::string HelpText(const Command& command) {
  std::string out = StrCat("altiplano ", command.name, ": ", command.summary, "\n\n  ", command.synopsis, "\n");
  std::vector<std::string_view> groups;  // in the order of their first flags
  for (const Flag& flag : command.flags) {
    if (std::find(groups.begin(), groups.end(), flag.group) == groups.end()) groups.push_back(flag.group);
  }
  for (std::string_view group : groups) {
    out += StrCat("\n", group.empty() ? "Flags" : group, "\n");
    for (const Flag& flag : command.flags) {
      if (flag.group == group) AppendFlag(out, flag);
    }
  }
  if (!command.notes.empty()) out += StrCat("\n", command.notes, "\n");
  return out;
}

}  // namespace altiplano::cli

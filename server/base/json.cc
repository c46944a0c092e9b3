#include "server/base/json.h"

#include <set>
#include <vector>

#include "server/base/strings.h"

namespace altiplano {

namespace {

// One pass before the real parse: structure only, so it needs neither recursion nor memory beyond a stack of key sets.
template <typename J>
class Guard : public nlohmann::json_sax<J> {
 public:
  using typename nlohmann::json_sax<J>::number_integer_t;
  using typename nlohmann::json_sax<J>::number_unsigned_t;
  using typename nlohmann::json_sax<J>::number_float_t;
  using typename nlohmann::json_sax<J>::string_t;
  using typename nlohmann::json_sax<J>::binary_t;

  explicit Guard(int max_depth) : max_depth_(max_depth) {}
  const std::string& error() const { return error_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return Enter(); }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_object() override { return Leave(); }
  bool end_array() override { return Leave(); }
  bool key(string_t& key) override {
    if (keys_.back().insert(key).second) return true;
    error_ = StrCat("duplicate key \"", Excerpt(key, 64), "\"");
    return false;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    error_ = JsonErrorText(position, e);
    return false;
  }

 private:
  bool Enter() {
    keys_.emplace_back();
    if (static_cast<int>(keys_.size()) <= max_depth_) return true;
    error_ = StrCat("nested deeper than ", max_depth_, " levels");
    return false;
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }

  const int max_depth_;
  std::vector<std::set<std::string>> keys_;
  std::string error_;
};

template <typename J>
StatusOr<J> Parse(std::string_view text, int max_depth) {
  RETURN_IF_ERROR(CheckNoNul(text));
  Guard<J> guard(max_depth);
  if (!J::sax_parse(text, &guard)) return Status(Code::kInvalidArgument, StrCat("not valid JSON: ", guard.error()));
  return J::parse(text, nullptr, /*allow_exceptions=*/false);
}

}  // namespace

StatusOr<Json> ParseJson(std::string_view text, int max_depth) {
  return Parse<Json>(text, max_depth);
}
StatusOr<OrderedJson> ParseOrderedJson(std::string_view text, int max_depth) {
  return Parse<OrderedJson>(text, max_depth);
}

Status CheckNoNul(std::string_view text) {
  const size_t at = text.find('\0');
  if (at == std::string_view::npos) return Status();
  return Status(Code::kInvalidArgument, StrCat("not valid JSON: a NUL byte (byte ", at + 1, ")"));
}

std::string JsonErrorText(std::size_t position, const nlohmann::detail::exception& error) {
  std::string_view what = error.what();
  // nlohmann prefixes "[json.exception.parse_error.101] "; the rest is for people.
  if (const auto at = what.find("] "); at != std::string_view::npos) what.remove_prefix(at + 2);
  return StrCat(Excerpt(what, 200), " (byte ", position, ")");
}

}  // namespace altiplano

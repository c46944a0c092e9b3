// Status: how one operation ended. Errors are values; nothing in Altiplano throws across a boundary.
//
// Codes have the numbers and meanings of gRPC's, so that the front end maps them one to one. An error may carry what
// the google.rpc details need (a machine-readable reason, offending fields, when to retry); the front end is the only
// place that turns them into protobuf. Why not absl::Status: docs/adr/0002-own-status.md.
#pragma once

#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace altiplano {

enum class Code : int {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
  kUnauthenticated = 16,
};

// "INVALID_ARGUMENT" and so on.
std::string_view CodeName(Code code);

struct FieldViolation {
  std::string field;        // dotted path as in the proto: "sampling.top_p"
  std::string description;  // what was found and what is allowed
};

// What a caller's program may act on; becomes google.rpc.ErrorInfo, BadRequest and RetryInfo.
struct ErrorDetail {
  std::string reason;                           // UPPER_SNAKE_CASE: "QUEUE_FULL"
  std::map<std::string, std::string> metadata;  // numbers of the case: {"limit": "8192", "actual": "9000"}
  std::vector<FieldViolation> field_violations;
  std::optional<std::chrono::milliseconds> retry_after;
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}
  Status(Code code, std::string message, ErrorDetail detail)
      : code_(code), message_(std::move(message)), detail_(std::make_shared<const ErrorDetail>(std::move(detail))) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  const ErrorDetail* detail() const { return detail_.get(); }  // null when there is none
  std::string_view reason() const { return detail_ ? std::string_view(detail_->reason) : std::string_view(); }

  // "INVALID_ARGUMENT: top_p is 1.5, must be in (0, 1]"
  std::string ToString() const;

 private:
  Code code_ = Code::kOk;
  std::string message_;
  std::shared_ptr<const ErrorDetail> detail_;
};

inline Status OkStatus() {
  return Status();
}

inline Status InvalidArgument(std::string message) {
  return Status(Code::kInvalidArgument, std::move(message));
}

// Either a value or the Status that says why there is none.
template <typename T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  StatusOr(Status status) : status_(std::move(status)) {  // NOLINT(google-explicit-constructor)
    if (status_.ok()) std::abort();                       // an OK status without a value is a bug
  }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& value() & { return Checked(); }
  const T& value() const& { return const_cast<StatusOr*>(this)->Checked(); }
  T&& value() && { return std::move(Checked()); }
  T& operator*() & { return Checked(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(Checked()); }
  T* operator->() { return &Checked(); }
  const T* operator->() const { return &value(); }

 private:
  T& Checked() {
    if (!value_.has_value()) std::abort();
    return *value_;
  }

  std::optional<T> value_;
  Status status_;
};

}  // namespace altiplano

#define ALTIPLANO_CONCAT_INNER(a, b) a##b
#define ALTIPLANO_CONCAT(a, b) ALTIPLANO_CONCAT_INNER(a, b)

// Returns from the calling function when `expr` is an error.
#define RETURN_IF_ERROR(expr)                                 \
  do {                                                        \
    if (auto status_ = (expr); !status_.ok()) return status_; \
  } while (false)

// ASSIGN_OR_RETURN(auto config, ParseConfig(text));
#define ASSIGN_OR_RETURN(lhs, expr) ASSIGN_OR_RETURN_IMPL(ALTIPLANO_CONCAT(status_or_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_IMPL(temp, lhs, expr) \
  auto temp = (expr);                          \
  if (!temp.ok()) return temp.status();        \
  lhs = std::move(temp).value()

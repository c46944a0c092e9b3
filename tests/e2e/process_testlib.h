// Child processes for end-to-end tests: the real program with its stdin, stdout and stderr in our hands.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace altiplano::e2e {

// Seconds until a test calls something hung; never how fast it should be. Under ThreadSanitizer all is ten times as
// slow.
#ifdef __SANITIZE_THREAD__
inline constexpr int kPatience = 240;
#else
inline constexpr int kPatience = 60;
#endif

class Process {
 public:
  // arguments: of the program at ALTIPLANO_BINARY_DIR/altiplano; flight records of one that serves go to the test's
  // temporary folder unless they say where. stderr goes to a file. network: of a namespace that it
  // runs in (network_testlib.h). Killed when the thread that makes it ends, so that no test leaves it behind.
  explicit Process(std::vector<std::string> arguments, std::optional<int> network = std::nullopt);
  Process(const Process&) = delete;
  ~Process();  // kills what still runs

  // The next line of stdout without its newline; "" at the end or after kPatience.
  std::string ReadLine();
  // Reads stdout until `text` has appeared; false at the end or after kPatience. Everything read so far is in output().
  bool ReadUntil(const std::string& text, int patience_ms = kPatience * 1000);
  const std::string& output() const { return output_; }
  void Write(const std::string& text);
  void CloseInput();
  void Signal(int signal);
  // Until the child has SIGTERM blocked or caught: before that, the kernel ends any program that gets one.
  bool WaitUntilTermIsHandled();
  // Exit code; 128 + signal when one killed it; -1 when it did not end within kPatience (it is killed then). Reads the
  // rest of stdout.
  int Wait();
  bool running();
  std::string Errors();  // what it wrote to stderr so far
  pid_t pid() const { return pid_; }

 private:
  bool ReadMore(int timeout_ms);

  pid_t pid_ = -1;
  int in_ = -1, out_ = -1;
  int exit_code_ = -1;
  bool ended_ = false;
  std::string output_;
  size_t lines_end_ = 0;  // of output_, handed out by ReadLine
  std::string errors_path_;
};

// `altiplano serve` with the tiny model, or a copy of it, on a free port.
class Server {
 public:
  explicit Server(std::vector<std::string> more_flags = {},
                  const std::string& model = ALTIPLANO_SOURCE_DIR "/tests/data/tiny");
  Process& process() { return process_; }
  // Waits for READY. "" when it did not come.
  const std::string& address();
  const std::string& ready_line();

 private:
  Process process_;
  std::string ready_line_, address_;
};

struct Finished {
  int code;
  std::string out, err;
};
Finished RunToEnd(std::vector<std::string> arguments, const std::string& input = "");

}  // namespace altiplano::e2e

// In every test program: a folder of its own for the temporary files of its tests and of the programs that they start,
// gone when it ends. Two programs at one time never meet in a file.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <string>

namespace altiplano {
namespace {

class TempFolder : public ::testing::Environment {
 public:
  void SetUp() override {
    if (getenv("TEST_TMPDIR") != nullptr) return;  // this is a death test of whoever made it, or somebody has chosen
    std::string path = std::filesystem::temp_directory_path() / "altiplano-test-XXXXXX";
    ASSERT_NE(mkdtemp(path.data()), nullptr) << path;
    path_ = path;
    setenv("TEST_TMPDIR", path.c_str(), 1);  // testing::TempDir
    setenv("TMPDIR", path.c_str(), 1);       // everybody else
  }
  void TearDown() override {
    if (!path_.empty()) std::filesystem::remove_all(path_);
  }

 private:
  std::string path_;
};

[[maybe_unused]] ::testing::Environment* const registered = ::testing::AddGlobalTestEnvironment(new TempFolder);

}  // namespace
}  // namespace altiplano

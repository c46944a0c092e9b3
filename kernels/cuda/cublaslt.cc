#include "kernels/cuda/cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "kernels/cuda/backend.h"
#include "kernels/device.h"

namespace altiplano::cuda {

namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA recommends for Hopper
constexpr size_t kMostChoices = 4096;

// The library's functions, found by name.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtGetVersion) version = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmulDescInit_internal) init_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutInit_internal) init_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceInit_internal) init_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  std::string error;  // empty: all of them are there
};

// Of the major version that the header is of: others may differ in what the structures hold.
Library Load() {
  Library library;
  const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  void* handle = nullptr;
  for (const std::string& path : {name, "/usr/local/cuda/lib64/" + name}) {
    if (handle == nullptr) handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    library.error = name + " is not on this machine";
    return library;
  }
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, symbol));
    if (function == nullptr) library.error = name + " has no " + symbol;
  };
  find(library.create, "cublasLtCreate");
  find(library.destroy, "cublasLtDestroy");
  find(library.version, "cublasLtGetVersion");
  find(library.multiply, "cublasLtMatmul");
  find(library.choose, "cublasLtMatmulAlgoGetHeuristic");
  find(library.init_product, "cublasLtMatmulDescInit_internal");
  find(library.set_product, "cublasLtMatmulDescSetAttribute");
  find(library.init_layout, "cublasLtMatrixLayoutInit_internal");
  find(library.init_preference, "cublasLtMatmulPreferenceInit_internal");
  find(library.set_preference, "cublasLtMatmulPreferenceSetAttribute");
  return library;
}

const Library& Lt() {
  static const Library* const library = new Library(Load());  // for as long as the process lives
  return *library;
}

// tokens, n, k, the operands' strides, dtype of out, accumulate
using Shape = std::array<int64_t, 8>;

struct Choice {
  bool usable = false;
  cublasLtMatmulAlgo_t algorithm;
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t weight, x, out;
};

// What belongs to a stream from PrepareCublasLt on; used by the thread that issues its ops.
class LtStream {
 public:
  explicit LtStream(int ordinal) {
    if (!Lt().error.empty()) return;
    if (const cublasStatus_t status = Lt().create(&handle_); status != CUBLAS_STATUS_SUCCESS) {
      handle_ = nullptr;
      TellOnce("its handle", status);
      return;
    }
    workspace_ = Buffer::Allocate(Device::kCuda, kWorkspaceBytes, ordinal);
  }
  ~LtStream() {
    if (handle_ != nullptr) Lt().destroy(handle_);
  }
  LtStream(const LtStream&) = delete;
  LtStream& operator=(const LtStream&) = delete;

  bool Multiply(cudaStream_t stream, const LinearArgs& args) {
    if (!workspace_) return false;
    const Shape shape = {args.x.dim(0),
                         args.weight.dim(0),
                         args.x.dim(1),
                         args.x.stride0,
                         args.weight.stride0,
                         args.out.stride0,
                         static_cast<int64_t>(args.out.dtype),
                         args.accumulate};
    auto found = choices_.find(shape);
    if (found == choices_.end()) {
      if (choices_.size() >= kMostChoices) choices_.clear();
      found = choices_.try_emplace(shape).first;
      Choose(shape, &found->second);
    }
    Choice& choice = found->second;
    if (!choice.usable) return false;
    const float alpha = 1, beta = args.accumulate ? 1 : 0;
    const cublasStatus_t status =
        Lt().multiply(handle_, &choice.product, &alpha, args.weight.data, &choice.weight, args.x.data, &choice.x, &beta,
                      args.out.data, &choice.out, args.out.data, &choice.out, &choice.algorithm, workspace_.data(),
                      workspace_.bytes(), stream);
    choice.usable = status == CUBLAS_STATUS_SUCCESS;  // what it refused once is ours from then on
    if (!choice.usable) TellOnce("a product that it had chosen a kernel for", status);
    return choice.usable;
  }

 private:
  // What it refuses takes longer, and nothing else shows that.
  void TellOnce(const char* refused, cublasStatus_t status) {
    if (std::exchange(told_, true)) return;
    std::fprintf(stderr, "%s refuses %s (status %d): what it refuses our own kernels multiply\n",
                 DescribeCublasLt().c_str(), refused, static_cast<int>(status));
  }

  // Column-major as cuBLASLt sees them: out^T [N, T] = weight^T^T [N, K] x^T [K, T].
  void Choose(const Shape& shape, Choice* choice) {
    const auto [tokens, n, k, x_stride, weight_stride, out_stride, out_dtype, accumulate] = shape;
    const cudaDataType out_type = static_cast<DType>(out_dtype) == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
    const auto size = [](int64_t count) { return static_cast<uint64_t>(count); };
    cublasStatus_t first = CUBLAS_STATUS_SUCCESS;  // that is none
    const auto note = [&first](cublasStatus_t status) {
      if (first == CUBLAS_STATUS_SUCCESS) first = status;
    };
    note(Lt().init_product(&choice->product, sizeof choice->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    note(Lt().set_product(&choice->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    const auto layout = [&](cublasLtMatrixLayoutOpaque_t& matrix, cudaDataType type, int64_t rows, int64_t columns,
                            int64_t stride) {
      note(Lt().init_layout(&matrix, sizeof matrix, type, size(rows), size(columns), stride));
    };
    layout(choice->weight, CUDA_R_16BF, k, n, weight_stride);
    layout(choice->x, CUDA_R_16BF, k, tokens, x_stride);
    layout(choice->out, out_type, n, tokens, out_stride);

    cublasLtMatmulPreferenceOpaque_t preference;
    note(Lt().init_preference(&preference, sizeof preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      note(Lt().set_preference(&preference, attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    // Parts of K are added in f32 and in a fixed order.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                           CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      prefer(attribute, uint32_t{16});
    }
    if (first != CUBLAS_STATUS_SUCCESS) return TellOnce("to describe a product", first);
    cublasLtMatmulHeuristicResult_t result;
    int results = 0;
    note(Lt().choose(handle_, &choice->product, &choice->weight, &choice->x, &choice->out, &choice->out, &preference, 1,
                     &result, &results));
    if (first == CUBLAS_STATUS_SUCCESS) note(results == 1 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED);
    if (first != CUBLAS_STATUS_SUCCESS) return TellOnce("to choose a kernel for a product", first);
    choice->usable = true;
    choice->algorithm = result.algo;
  }

  cublasLtHandle_t handle_ = nullptr;
  Buffer workspace_;
  std::map<Shape, Choice> choices_;
  bool told_ = false;
};

struct Streams {
  std::mutex mutex;  // guards `of`
  std::map<void*, std::unique_ptr<LtStream>> of;
  std::atomic<uint64_t> forgotten{0};  // how many, ever
};
Streams& AllStreams() {
  static auto* streams = new Streams();
  return *streams;
}

// Threads mostly issue ops on one stream, which is found again without the lock until any stream is forgotten. Null: it
// was not prepared.
LtStream* Find(const Stream& stream) {
  thread_local struct {
    void* stream = nullptr;
    uint64_t forgotten = 0;
    LtStream* found = nullptr;
  } last;
  Streams& streams = AllStreams();
  void* const wanted = stream.cuda_stream();
  if (last.found == nullptr || last.stream != wanted || last.forgotten != streams.forgotten) {
    std::lock_guard lock(streams.mutex);
    const auto found = streams.of.find(wanted);
    if (found == streams.of.end()) return nullptr;
    last = {wanted, streams.forgotten, found->second.get()};
  }
  return last.found;
}

}  // namespace

void PrepareCublasLt(const Stream& stream) {
  UseGpu(stream.ordinal());  // a handle is of the thread's GPU
  Streams& streams = AllStreams();
  std::lock_guard lock(streams.mutex);
  std::unique_ptr<LtStream>& found = streams.of[stream.cuda_stream()];
  if (found == nullptr) found = std::make_unique<LtStream>(stream.ordinal());
}

void ForgetCublasLt(void* stream) {
  Streams& streams = AllStreams();
  std::unique_ptr<LtStream> forgotten;
  std::lock_guard lock(streams.mutex);
  if (auto found = streams.of.find(stream); found != streams.of.end()) {
    forgotten = std::move(found->second);
    streams.of.erase(found);
    ++streams.forgotten;
  }
}

bool CublasLtLinear(Stream& stream, const LinearArgs& args) {
  LtStream* const found = Find(stream);
  return found != nullptr && found->Multiply(static_cast<cudaStream_t>(stream.cuda_stream()), args);
}

std::string WhyNoCublasLt() {
  return Lt().error;
}

std::string DescribeCublasLt() {
  if (!Lt().error.empty()) return Lt().error;
  const size_t version = Lt().version();
  return "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace altiplano::cuda

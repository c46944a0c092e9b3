// Stands in for libcublasLt: the ten functions that cublaslt.cc uses, computed on the host in memory that the simulator
// gave out. It fills the library's opaque structures with fields of its own, and refuses what the real one would.
#include <cublasLt.h>

#include <atomic>
#include <cstring>

#include "kernels/tensor.h"

namespace {

struct Product {
  cublasComputeType_t compute;
  cublasOperation_t transpose_a;
};
struct Layout {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Preference {
  uint64_t workspace;
  uint32_t alignment;
};

template <typename Fields, typename Opaque>
Fields& In(Opaque* opaque) {
  static_assert(sizeof(Fields) <= sizeof(Opaque));
  return *reinterpret_cast<Fields*>(opaque);
}
template <typename Fields, typename Opaque>
const Fields& In(const Opaque* opaque) {
  return *reinterpret_cast<const Fields*>(opaque);
}

float Get(const void* data, cudaDataType type, int64_t at) {
  using altiplano::BF16;
  return type == CUDA_R_16BF ? ToFloat(static_cast<const BF16*>(data)[at]) : static_cast<const float*>(data)[at];
}

bool Fit(const Product& product, const Layout& a, const Layout& b, const Layout& d) {
  return product.compute == CUBLAS_COMPUTE_32F && product.transpose_a == CUBLAS_OP_T && a.rows == b.rows &&
         a.columns == d.rows && b.columns == d.columns && a.stride >= static_cast<int64_t>(a.rows) &&
         b.stride >= static_cast<int64_t>(b.rows) && d.stride >= static_cast<int64_t>(d.rows);
}

}  // namespace

extern "C" {

// For the test. Ranks count from threads of their own.
std::atomic<int> fake_handles = 0, fake_choices = 0, fake_products = 0;
bool fake_refuses_choices = false, fake_refuses_products = false;

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  ++fake_handles;
  *handle = reinterpret_cast<cublasLtHandle_t>(&fake_products);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
  --fake_handles;
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() {
  return 130100;
}
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, size_t, cublasComputeType_t compute,
                                               cudaDataType_t) {
  In<Product>(product) = {compute, CUBLAS_OP_N};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (attribute != CUBLASLT_MATMUL_DESC_TRANSA || bytes != sizeof(cublasOperation_t))
    return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&In<Product>(product).transpose_a, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t stride) {
  In<Layout>(layout) = {type, rows, columns, stride};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, size_t) {
  In<Preference>(preference) = {0, 256};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  const bool wide = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
  if (bytes != (wide ? sizeof(uint64_t) : sizeof(uint32_t))) return CUBLAS_STATUS_INVALID_VALUE;
  if (wide) std::memcpy(&In<Preference>(preference).workspace, value, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) {
    std::memcpy(&In<Preference>(preference).alignment, value, bytes);
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int,
                                              cublasLtMatmulHeuristicResult_t results[], int* count) {
  ++fake_choices;
  *count = 0;
  if (fake_refuses_choices || c != d || !Fit(In<Product>(product), In<Layout>(a), In<Layout>(b), In<Layout>(d)) ||
      In<Preference>(preference).workspace == 0 || In<Preference>(preference).alignment > 16) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  results[0] = {};
  results[0].algo.data[0] = 42;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t) {
  const Layout &in_a = In<Layout>(a_layout), &in_b = In<Layout>(b_layout), &in_d = In<Layout>(d_layout);
  if (fake_refuses_products || algorithm->data[0] != 42 || workspace == nullptr || workspace_bytes == 0) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  ++fake_products;
  for (int64_t column = 0; column < static_cast<int64_t>(in_d.columns); ++column) {
    for (int64_t row = 0; row < static_cast<int64_t>(in_d.rows); ++row) {
      float sum = 0;
      for (int64_t k = 0; k < static_cast<int64_t>(in_a.rows); ++k) {
        sum += Get(a, in_a.type, row * in_a.stride + k) * Get(b, in_b.type, column * in_b.stride + k);
      }
      const int64_t at = column * in_d.stride + row;
      const float scale = *static_cast<const float*>(beta);
      sum *= *static_cast<const float*>(alpha);
      if (scale != 0) sum += scale * Get(c, in_d.type, at);
      if (in_d.type == CUDA_R_16BF) {
        static_cast<altiplano::BF16*>(d)[at] = altiplano::ToBF16(sum);
      } else {
        static_cast<float*>(d)[at] = sum;
      }
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"

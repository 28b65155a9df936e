// cuBLASLt's product of scaled 8-bit matrices, e4m3 by e4m3.
#pragma once

#include <cublasLt.h>

#include <memory>

#include "benchmarks/harness.cuh"
#include "cuda/matmul/params.h"

namespace jaxkern::bench {

struct Recipe {
  const char* name;
  Scaling lhs, rhs;
  bool fast;
  DType out;
};

inline void check(cublasStatus_t status, const char* what) {
  require(status == CUBLAS_STATUS_SUCCESS,
          std::string(what) + ": " + cublasLtGetStatusString(status));
}

struct Lt {
  static constexpr size_t kWorkspace = 64 << 20;
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t matmul;
  cublasLtMatrixLayout_t a, b, d;
  void* workspace = allocate<char>(kWorkspace);

  // Its matrices are column-major: it sees the transposes, so out^T = (rhs^T)^T lhs^T.
  Lt(const Recipe& recipe, const ScaledMatmulParams& p) {
    check(cublasLtCreate(&handle), "cublasLtCreate");
    check(cublasLtMatmulDescCreate(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F), "DescCreate");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(recipe.fast));
    set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode(recipe.rhs));
    set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode(recipe.lhs));
    const auto layout = [](cublasLtMatrixLayout_t* x, cudaDataType_t type, int64_t rows,
                           int64_t cols) {
      check(cublasLtMatrixLayoutCreate(x, type, rows, cols, rows), "LayoutCreate");
    };
    layout(&a, CUDA_R_8F_E4M3, p.K, p.N);
    layout(&b, CUDA_R_8F_E4M3, p.K, p.M);
    layout(&d, recipe.out == DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF, p.N, p.M);
  }

  template <class Value>
  void set(cublasLtMatmulDescAttributes_t attribute, Value value) {
    check(cublasLtMatmulDescSetAttribute(matmul, attribute, &value, sizeof(value)), "attribute");
  }

  static cublasLtMatmulMatrixScale_t mode(Scaling scaling) {
    switch (scaling) {
      case Scaling::kTensor:
        return CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
      case Scaling::kRow:
        return CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
      case Scaling::kBlock1x128:
        return CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
      case Scaling::kBlock128x128:
        return CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    }
    return CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
  }

  cublasStatus_t run(const ScaledMatmulParams& p, const cublasLtMatmulAlgo_t& algorithm,
                     cudaStream_t stream) {
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p.rhs_scale);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p.lhs_scale);
    const float one = 1.0f, zero = 0.0f;
    return cublasLtMatmul(handle, matmul, &one, p.rhs, a, p.lhs, b, &zero, p.out, d, p.out, d,
                          &algorithm, workspace, kWorkspace, stream);
  }
};

// Of the algorithms for a problem the fastest of the first eight, by a sample of each. matmul: from
// what the comparison takes to the product.
template <class Params, class Matmul>
Provider<Params> cublaslt(const Recipe& recipe, const ScaledMatmulParams& p,
                          Comparison<Params>& comparison, const Matmul& matmul) {
  const auto lt = std::make_shared<Lt>(recipe, p);
  lt->set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p.rhs_scale);
  lt->set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p.lhs_scale);
  cublasLtMatmulPreference_t preference;
  check(cublasLtMatmulPreferenceCreate(&preference), "PreferenceCreate");
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &Lt::kWorkspace, sizeof(Lt::kWorkspace)),
        "workspace");
  constexpr int kMost = 8;
  cublasLtMatmulHeuristicResult_t found[kMost];
  int count = 0;
  check(cublasLtMatmulAlgoGetHeuristic(lt->handle, lt->matmul, lt->a, lt->b, lt->d, lt->d,
                                       preference, kMost, found, &count),
        "AlgoGetHeuristic");
  Provider<Params> fastest;
  float least = INFINITY;
  for (int i = 0; i < count; ++i) {
    const auto algorithm = found[i].algo;
    if (lt->run(p, algorithm, nullptr) != CUBLAS_STATUS_SUCCESS) continue;
    const auto run = [lt, algorithm, matmul](const Params& params, cudaStream_t stream) {
      check(lt->run(matmul(params), algorithm, stream), "cublasLtMatmul");
    };
    const Provider<Params> candidate = {"cublaslt", run};
    constexpr int kCalls = 20;
    if (const float us = comparison.sample(candidate, kCalls); us < least) {
      least = us;
      fastest = candidate;
    }
  }
  require(least < INFINITY, "cublasLt has no algorithm for this problem");
  return fastest;
}

inline Provider<ScaledMatmulParams> cublaslt(const Recipe& recipe, const ScaledMatmulParams& p,
                                             Comparison<ScaledMatmulParams>& comparison) {
  return cublaslt(recipe, p, comparison, [](const ScaledMatmulParams& p) { return p; });
}

}  // namespace jaxkern::bench

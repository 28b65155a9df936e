// Launches the matrix product: d = a b.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/matmul/gemm_sm90.cuh"

namespace jaxkern {

// Row-major and contiguous, 16-byte aligned. K and N are multiples of 8; no size is zero.
struct GemmParams {
  const void* a;  // (M, K)
  const void* b;  // (K, N)
  void* d;        // (M, N)
  int64_t M, N, K;
};

template <class Gemm>
cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream, int group = 8) {
  using Cluster = typename Gemm::Cluster;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;

  constexpr auto kDtype = std::is_same_v<typename Gemm::T, tile::bf16>
                              ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto [a, b, d, M, N, K] = params;
  typename Gemm::Params p;
  if (cudaError_t error = make_matrix_map(&p.a, kDtype, a, M, K, Gemm::kBlockM)) return error;
  if (cudaError_t error = make_matrix_map(&p.b, kDtype, b, K, N, Gemm::kBlockK)) return error;
  if (cudaError_t error = make_matrix_map(&p.d, kDtype, d, M, N, Gemm::TileD::kRows)) return error;
  p.order = {
      .rows = static_cast<int>(tile::ceil_div<int64_t>(M, Gemm::kBlockM * Cluster::kBlocks)),
      .cols = static_cast<int>(tile::ceil_div<int64_t>(N, Gemm::kBlockN)),
      .group = group,
  };
  p.K = static_cast<int>(K);
  const int clusters = std::min(p.order.count(), multiprocessors / Cluster::kBlocks);
  return launch(gemm_sm90_kernel<Gemm>, clusters * Cluster::kBlocks, Gemm::kThreads,
                Gemm::kSharedBytes, stream, p);
}

}  // namespace jaxkern

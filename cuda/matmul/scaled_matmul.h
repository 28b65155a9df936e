// Launches one instance of the product of scaled 8-bit matrices.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/matmul/scaled_matmul_sm90.cuh"

namespace jaxkern {

template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  if (std::is_same_v<T, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (std::is_same_v<T, tile::bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (std::is_same_v<T, tile::f16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static_assert(sizeof(T) != 1, "8-bit types are UINT8 to TMA");
}

template <class Matmul>
cudaError_t launch_scaled_matmul_sm90(const ScaledMatmulParams& params, cudaStream_t stream,
                                      int group = 8) {
  using Cluster = typename Matmul::Cluster;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;

  constexpr auto kByte = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  constexpr auto kOut = tensor_map_type<typename Matmul::Out>();
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t K_blocks = tile::ceil_div<int64_t>(K, Matmul::kBlockK);
  typename Matmul::Params p = {};
  if (cudaError_t error = make_matrix_map(&p.lhs, kByte, params.lhs, B * M, K, Matmul::kBlockM))
    return error;
  if (cudaError_t error =
          make_matrix_map(&p.rhs, kByte, params.rhs, B * N, K, Matmul::kBlockN / Cluster::kBlocks))
    return error;
  if (cudaError_t error = make_tensor_map(&p.out, kOut, params.out, B, M, 1, N, 64)) return error;
  if constexpr (Matmul::kLhsBlocks) {
    if (cudaError_t error = make_row_map(&p.lhs_rows, params.lhs_scale, B * K_blocks,
                                         padded_scale_row(M), Matmul::kBlockM))
      return error;
  }
  if constexpr (Matmul::kRhsBlocks) {
    if (cudaError_t error = make_row_map(&p.rhs_rows, params.rhs_scale, B * K_blocks,
                                         padded_scale_row(N), Matmul::kBlockN))
      return error;
  }
  p.lhs_scale = params.lhs_scale;
  p.rhs_scale = params.rhs_scale;
  p.bias = params.bias;
  p.lhs_scale_step = params.lhs_scaling == Scaling::kRow;
  p.rhs_scale_step = params.rhs_scaling == Scaling::kRow;
  p.order = {
      .rows = static_cast<int>(tile::ceil_div<int64_t>(M, Matmul::kBlockM * Cluster::kBlocks)),
      .cols = static_cast<int>(tile::ceil_div<int64_t>(N, Matmul::kBlockN)),
      .group = group,
  };
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.K_blocks = static_cast<int>(K_blocks);
  const int64_t clusters =
      std::min<int64_t>(B * p.order.count(), multiprocessors / Cluster::kBlocks);
  return launch(scaled_matmul_sm90_kernel<Matmul>, clusters * Cluster::kBlocks, Matmul::kThreads,
                Matmul::kSharedBytes, stream, p);
}

}  // namespace jaxkern

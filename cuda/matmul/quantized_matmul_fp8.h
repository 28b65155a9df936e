// Launches instances of products of e4m3 with weights of four bits.
#pragma once

#include <algorithm>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/matmul/quantized_matmul_fp8_sm90.cuh"
#include "cuda/matmul/tensor_maps.h"

namespace jaxkern {

// Rows of tiles of clusters that are worked through together, so that L2 keeps what they share.
inline constexpr int kFourBitFp8Group = 8;

template <class Matmul>
cudaError_t launch_four_bit_fp8_sm90(const QuantizedMatmulFp8Params& params, cudaStream_t stream,
                                     int group = kFourBitFp8Group) {
  using Cluster = typename Matmul::Cluster;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t strips = tile::ceil_div(N, kFourBitRows);
  typename Matmul::Params p = {};
  p.x_scale = params.x_scale;
  p.weight = params.w;
  p.tile_bytes = params.w.tile_bytes();
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.panels = static_cast<int>(K / kFourBitColumns);
  if (cudaError_t error = make_matrix_map(&p.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, params.x, B * M, K,
                                          Matmul::kTokens / Cluster::kBlocks))
    return error;
  if (cudaError_t error = make_block_map(&p.w, params.w.data, B * strips, p.panels, p.tile_bytes,
                                         Matmul::kStrips, 1))
    return error;
  if (cudaError_t error = make_tensor_map(&p.out, tensor_map_type<typename Matmul::Out>(),
                                          params.out, B, M, 1, N, Matmul::kPiece))
    return error;
  p.order = {
      .rows = tile::ceil_div(p.N, Matmul::kRows * Cluster::kBlocks),
      .cols = tile::ceil_div(p.M, Matmul::kTokens),
      .group = group,
  };
  const int clusters = std::min(p.B * p.order.count(), multiprocessors / Cluster::kBlocks);
  return launch(quantized_matmul_fp8_sm90_kernel<Matmul>, int64_t{clusters} * Cluster::kBlocks,
                Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// How long the kernel takes, in tiles of 256 tokens on the busiest multiprocessor.
template <class Matmul>
double four_bit_fp8_tiles(const QuantizedMatmulFp8Params& p, int multiprocessors) {
  constexpr double kTime = Matmul::kTokens == 256 ? 1.0 : 0.6;
  constexpr int kBlocks = Matmul::Cluster::kBlocks;
  const int64_t high = tile::ceil_div<int64_t>(p.N, Matmul::kRows * kBlocks);
  const int64_t tiles = p.B * high * tile::ceil_div<int64_t>(p.M, Matmul::kTokens);
  return kTime * static_cast<double>(tile::ceil_div(tiles, multiprocessors / kBlocks));
}

// By the faster of two kernels.
template <FourBitFormat kFormat, class Out>
cudaError_t launch_four_bit_fp8_of_sm90(const QuantizedMatmulFp8Params& params,
                                        cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  using Middle = QuantizedMatmulFp8<kFormat, Out, 128>;
  using Wide = QuantizedMatmulFp8<kFormat, Out, 256>;
  return four_bit_fp8_tiles<Wide>(params, multiprocessors) <=
                 four_bit_fp8_tiles<Middle>(params, multiprocessors)
             ? launch_four_bit_fp8_sm90<Wide>(params, stream)
             : launch_four_bit_fp8_sm90<Middle>(params, stream);
}

}  // namespace jaxkern

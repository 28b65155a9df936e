// Launches instances of products with weights of four bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/matmul/quantized_matmul_few_rows_sm90.cuh"
#include "cuda/matmul/quantized_matmul_sm90.cuh"
#include "cuda/matmul/tensor_maps.h"

namespace jaxkern {

// How a product of few rows is cut up.
struct FourBitPlan {
  int strips;  // of 16 rows of weights, of a tile
  int panels;  // of 128 columns, of a stage
  double us;   // that it takes, an estimate
  int ahead = 0;
};

// On their way to a multiprocessor at once. NOTE:
inline constexpr int kBytesAhead = 48 << 10;

// Of a stage, for consumers of so many strips each: the least beyond the end of K, then fewest, but
// at least half of the consumers have work.
inline int four_bit_panels(int64_t panels, int strips, int consumers) {
  int best = 1;
  int64_t fewest = INT64_MAX;
  for (int count = tile::ceil_div(consumers / 2, strips); count * strips <= consumers; ++count) {
    const int64_t with_rest = tile::ceil_div(panels, count) * count;
    if (with_rest < fewest) best = count, fewest = with_rest;
  }
  return best;
}

// The fastest plan. A tile has so many strips that all multiprocessors get equally many tiles.
//
// NOTE: the constants are those of scaled_matmul's few_rows_plan().
inline FourBitPlan four_bit_plan(const QuantizedMatmulParams& p, int consumers,
                                 int multiprocessors) {
  constexpr double kMemory = 4.4e6, kMultiprocessor = 85e3;  // bytes that each reads in 1 us
  constexpr double kTile = 0.5;                              // us at the end of one
  const int64_t strips = tile::ceil_div(p.N, kFourBitRows);
  const int64_t panels = tile::ceil_div(p.K, kFourBitColumns);
  const double strip_bytes = static_cast<double>(panels) * p.w.tile_bytes();
  const double x_bytes = static_cast<double>(p.M * p.K) * 2;
  FourBitPlan best = {0, 0, INFINITY};
  for (int count = 1; count <= std::min(consumers, 16); ++count) {
    const int64_t tiles = p.B * tile::ceil_div(strips, count);
    const auto rounds = static_cast<double>(tile::ceil_div(tiles, multiprocessors));
    const double most = rounds * (count * strip_bytes + x_bytes);  // that a multiprocessor reads
    const double even = rounds * count * strip_bytes * multiprocessors / kMemory;
    const double us = 2.5 + std::max(even, most / kMultiprocessor) + rounds * kTile;
    if (us < best.us) best = {count, four_bit_panels(panels, count, consumers), us};
  }
  return best;
}

template <class Matmul>
cudaError_t launch_four_bit_plan_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                      const FourBitPlan& plan) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  if (params.M > Matmul::kTokens || plan.strips < 1 || plan.panels < 1 ||
      plan.strips * plan.panels > Matmul::kConsumers) {
    return cudaErrorInvalidValue;
  }
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t strips = tile::ceil_div(N, kFourBitRows),
                panels = tile::ceil_div(K, kFourBitColumns);
  typename Matmul::Params p = {};
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.weight = params.w;
  p.tile_bytes = params.w.tile_bytes();
  p.strips = plan.strips;
  p.panels = plan.panels;
  p.steps = static_cast<int>(tile::ceil_div(panels, p.panels));
  p.x_bytes = 2 * p.panels * static_cast<int>(M) * tile::kPanelBytes;
  p.w_bytes = p.strips * p.panels * p.tile_bytes;
  p.w_place = p.x_bytes;
  p.stage_bytes = tile::ceil_div(p.x_bytes + p.w_bytes, 1024) * 1024;  // as swizzles repeat
  p.stages = std::min(Matmul::kMaxStages, Matmul::kStageBytes / p.stage_bytes);
  p.ahead = std::min(
      p.stages, tile::ceil_div(plan.ahead ? plan.ahead << 10 : kBytesAhead, p.w_bytes + p.x_bytes));
  p.x_box = 2 * p.panels;
  constexpr auto kType = tensor_map_type<typename Matmul::T>();
  if (cudaError_t error = make_panel_map(&p.x, kType, params.x, B * M, K, p.M, &p.x_box))
    return error;
  if (cudaError_t error =
          make_block_map(&p.w, params.w.data, B * strips, panels, p.tile_bytes, p.strips, p.panels))
    return error;
  p.out = params.out;
  p.out_dtype = params.out_dtype;
  p.tiles = static_cast<int>(tile::ceil_div(strips, p.strips));
  const int64_t blocks = std::min<int64_t>(B * p.tiles, multiprocessors);
  return launch(quantized_matmul_few_rows_sm90_kernel<Matmul>, blocks, Matmul::kThreads,
                Matmul::kSharedBytes, stream, p);
}

template <class Matmul>
cudaError_t launch_four_bit_few_rows_sm90(const QuantizedMatmulParams& params,
                                          cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const FourBitPlan plan = four_bit_plan(params, Matmul::kConsumers, multiprocessors);
  return launch_four_bit_plan_sm90<Matmul>(params, stream, plan);
}

// --- Many rows -----------------------------------------------------------------------------------

// Rows of tiles of clusters that are worked through together, so that L2 keeps what they share.
inline constexpr int kFourBitGroup = 4;

template <class Matmul>
cudaError_t launch_four_bit_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                 int group = kFourBitGroup) {
  using Cluster = typename Matmul::Cluster;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t strips = tile::ceil_div(N, kFourBitRows);
  typename Matmul::Params p = {};
  p.weight = params.w;
  p.tile_bytes = params.w.tile_bytes();
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.panels = static_cast<int>(tile::ceil_div(K, kFourBitColumns));
  if (cudaError_t error = make_matrix_map(&p.x, tensor_map_type<typename Matmul::T>(), params.x,
                                          B * M, K, Matmul::kTokens / Cluster::kBlocks))
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
  return launch(quantized_matmul_sm90_kernel<Matmul>, int64_t{clusters} * Cluster::kBlocks,
                Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// How long the kernel takes, in tiles of 256 tokens on the busiest multiprocessor.
//
// NOTE: on an H200 a tile of 128 tokens takes 0.56 of the time of one of 256, and one of 64, of
// which expanding weights is most, 0.46.
template <class Matmul>
double four_bit_tiles(const QuantizedMatmulParams& p, int multiprocessors) {
  constexpr double kTime = Matmul::kTokens == 256 ? 1.0 : Matmul::kTokens == 128 ? 0.56 : 0.46;
  constexpr int kBlocks = Matmul::Cluster::kBlocks;
  const int64_t high = tile::ceil_div<int64_t>(p.N, Matmul::kRows * kBlocks);
  const int64_t tiles = p.B * high * tile::ceil_div<int64_t>(p.M, Matmul::kTokens);
  return kTime * static_cast<double>(tile::ceil_div(tiles, multiprocessors / kBlocks));
}

// By the fastest of all kernels.
template <FourBitFormat kFormat, class T, class Out>
cudaError_t launch_four_bit_of_sm90(const QuantizedMatmulParams& params, cudaStream_t stream) {
  const auto few = [&]<int kTokens>() {
    return launch_four_bit_few_rows_sm90<QuantizedMatmulFewRows<kFormat, T, kTokens>>(params,
                                                                                      stream);
  };
  if (params.M <= 8) return few.template operator()<8>();
  if (params.M <= 16) return few.template operator()<16>();
  if (params.M <= 32) return few.template operator()<32>();
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  using Narrow = QuantizedMatmul<kFormat, T, Out, 64>;
  using Middle = QuantizedMatmul<kFormat, T, Out, 128>;
  using Wide = QuantizedMatmul<kFormat, T, Out, 256>;
  const double narrow = four_bit_tiles<Narrow>(params, multiprocessors);
  const double middle = four_bit_tiles<Middle>(params, multiprocessors);
  const double wide = four_bit_tiles<Wide>(params, multiprocessors);
  if (wide <= std::min(middle, narrow)) return launch_four_bit_sm90<Wide>(params, stream);
  return middle <= narrow ? launch_four_bit_sm90<Middle>(params, stream)
                          : launch_four_bit_sm90<Narrow>(params, stream);
}

}  // namespace jaxkern

// Launches instances of products with weights of four bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/matmul/quantized_matmul_few_rows_sm90.cuh"

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
  constexpr auto kType = std::is_same_v<typename Matmul::T, tile::bf16>
                             ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
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

}  // namespace jaxkern

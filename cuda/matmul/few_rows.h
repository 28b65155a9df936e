// Launches instances of the product of scaled 8-bit matrices for few rows of lhs.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/matmul/params.h"
#include "cuda/matmul/scaled_matmul_few_rows_sm90.cuh"

namespace jaxkern {

// The instance for up to `tokens` rows of lhs (16, 32, 64 or 128) with tiles of up to 64 * groups
// rows of rhs (1, 2 or 4). Up to 64 tokens four consumers are not too many: without enough of them
// the sums of a stage would take longer than its loads. Those of 128 take more registers each.
constexpr FewRowsConfig few_rows_config(int tokens, int groups) {
  if (tokens == 128) return {tokens, groups, groups == 1 ? 2 : 1, 1, groups == 4 ? 2 : 1};
  const int halves = tokens == 64 && groups < 4 ? 2 : 1;
  return {tokens, groups, halves, 4 / groups / halves};
}

// How a product is cut up.
struct FewRowsPlan {
  int rows;    // of a tile
  int splits;  // blocks that share out its K, 1 or 2
  double us;   // that it takes, an estimate
};

// The fastest plan for an instance with tiles of up to 64 * groups rows, but more than half of
// that, or `us` infinite. Tiles are so high that all multiprocessors get equally many; or, for
// short products, twice or four times as high, up to 64 rows, which is less to read in all.
//
// NOTE: the constants are those of an H200, in us and bytes, from 22 products of 1 to 128 tokens.
// What the library takes by this is 0.4% slower than the fastest of the plans measured for each, 3%
// at most. The estimates are off by 5%. 2.5 us of a launch are no reading.
inline FewRowsPlan few_rows_plan(const ScaledMatmulParams& p, int tokens, int groups,
                                 int multiprocessors) {
  constexpr double kMemory = 4.4e6, kMultiprocessor = 85e3;  // bytes that each reads in 1 us
  constexpr double kTokens = 15e6;              // those come from the L2 cache, but delay the rest
  constexpr double kSplit = 0.3, kSums = 25e3;  // to meet the other block, and what it is sent
  const int64_t B = p.B, N = p.N, most_rows = 64 * groups;
  const double K = static_cast<double>(p.K);
  FewRowsPlan best = {0, 0, INFINITY};
  for (const int splits : {1, 2}) {
    const int64_t at_once = multiprocessors / splits;
    const int64_t fewest = tile::ceil_div(N, most_rows);  // tiles of a matrix
    const int64_t rounds = tile::ceil_div(B * fewest, at_once);
    if (splits == 2 && rounds > 1) continue;  // clusters have but one tile
    const int64_t most = std::max(rounds * at_once / B, fewest);
    int64_t rows = tile::ceil_div(tile::ceil_div(N, most), 8) * 8;
    if (groups > 1 && rows <= most_rows / 2) continue;  // consumers without rows
    for (; rows <= most_rows; rows *= 2) {
      const int64_t tiles = B * tile::ceil_div(N, rows);
      const double reads = tile::ceil_div(tiles, at_once) * K / splits * (rows + tokens);
      const double us = 2.5 + std::max(B * N * K / kMemory, reads / kMultiprocessor) +
                        tiles * K * tokens / kTokens +
                        (splits - 1) * (kSplit + rows * tokens * 2 / kSums);
      if (us < best.us) best = {static_cast<int>(rows), splits, us};
    }
  }
  return best;
}

template <class Matmul>
cudaError_t launch_few_rows_plan_sm90(const ScaledMatmulParams& params, cudaStream_t stream,
                                      const FewRowsPlan& plan) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t K_blocks = scale_blocks(K);
  if (M > Matmul::kTokens || plan.rows > Matmul::kRows) return cudaErrorInvalidValue;
  typename Matmul::Params p = {};
  p.lhs_box = p.rhs_box = Matmul::kPanels;
  if (cudaError_t error = make_panel_map(&p.lhs, CU_TENSOR_MAP_DATA_TYPE_UINT8, params.lhs, B * M,
                                         K, Matmul::kTokens, &p.lhs_box))
    return error;
  if (cudaError_t error = make_panel_map(&p.rhs, CU_TENSOR_MAP_DATA_TYPE_UINT8, params.rhs, B * N,
                                         K, plan.rows, &p.rhs_box))
    return error;
  if constexpr (Matmul::kBlocks) {
    if (cudaError_t error = make_row_map(&p.lhs_rows, params.lhs_scale, B * K_blocks,
                                         padded_scale_row(M), Matmul::kTokens))
      return error;
  }
  p.lhs_scale = params.lhs_scale;
  p.rhs_scale = params.rhs_scale;
  p.bias = params.bias;
  p.out = static_cast<typename Matmul::Out*>(params.out);
  p.lhs_row_scales = params.lhs_scaling == Scaling::kRow;
  p.rhs_row_scales = params.rhs_scaling == Scaling::kRow;
  p.rows = plan.rows;
  p.splits = plan.splits;
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.K_blocks = static_cast<int>(K_blocks);
  p.tiles = tile::ceil_div(p.N, p.rows);
  p.stages = tile::ceil_div(p.K_blocks, Matmul::kPanels);
  p.rhs_bytes = Matmul::kPanels * p.rows * 128;
  p.first_stages = std::min(Matmul::kStages, tile::ceil_div(64 << 10, p.rhs_bytes));

  const int groups = tile::ceil_div(p.rows, 64);
  p.releases = 4 * tile::ceil_div(groups, Matmul::kWaves) * Matmul::kHalves * Matmul::kPanels;
  // Units are numbered half by half, kGroups each.
  const int parts = ((Matmul::kHalves - 1) * Matmul::kGroups + groups) * Matmul::kParts;
  p.owners = p.splits == 2 ? std::min(parts, 2) : 0;
  p.sum_stages = tile::ceil_div(tile::ceil_div(parts, 2), Matmul::kPartsPerStage);
  const int64_t tiles = B * p.tiles;
  const int64_t blocks = p.splits == 2 ? 2 * tiles : std::min<int64_t>(tiles, multiprocessors);
  return launch_clusters(scaled_matmul_few_rows_sm90_kernel<Matmul>, blocks, p.splits == 2 ? 2 : 0,
                         Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// Tiles of the height, in groups of 64 rows, whose plan takes least time. Up to 32 tokens the
// library is without those of up to 128 rows: 1 to 2% faster where N is 14,336, nowhere else.
template <class Out, BlockScales kScales, bool kFastAccumulation, int kTokens>
cudaError_t launch_few_rows_sm90(const ScaledMatmulParams& params, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const auto plan = [&](int groups) {
    return few_rows_plan(params, kTokens, groups, multiprocessors);
  };
  const auto run = [&]<int kGroups>() {
    using Matmul =
        ScaledMatmulFewRows<Out, kScales, kFastAccumulation, few_rows_config(kTokens, kGroups)>;
    return launch_few_rows_plan_sm90<Matmul>(params, stream, plan(kGroups));
  };
  if constexpr (kTokens > 32) {
    if (plan(2).us < std::min(plan(1).us, plan(4).us)) return run.template operator()<2>();
  }
  return plan(1).us <= plan(4).us ? run.template operator()<1>() : run.template operator()<4>();
}

}  // namespace jaxkern

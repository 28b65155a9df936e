// Launches instances of products with weights of four bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/matmul/quantized_matmul_few_rows_sm90.cuh"
#include "cuda/matmul/quantized_matmul_one_row.cuh"
#include "cuda/matmul/quantized_matmul_sm90.cuh"
#include "cuda/matmul/quantized_matmul_some_rows_sm90.cuh"
#include "cuda/matmul/tensor_maps.h"

namespace jaxkern {

// --- One row -------------------------------------------------------------------------------------

// Warps of a block: as many as leave room for all blocks at once, or, of very many blocks, so many
// that each has some tiles.
template <class Matmul>
int one_row_warps(const QuantizedMatmulParams& p, int multiprocessors) {
  constexpr int kTiles = 8;
  const int64_t blocks = p.B * tile::ceil_div(p.N, kFourBitRows);
  const int64_t panels = tile::ceil_div(p.K, kFourBitColumns);
  int64_t most = int64_t{Matmul::kResidentWarps} * multiprocessors / blocks;
  if (most == 0) most = tile::ceil_div<int64_t>(panels, kTiles);
  int warps = 1;
  while (2 * warps <= std::min({most, panels, int64_t{Matmul::kMaxWarps}})) warps *= 2;
  return warps;
}

template <class Matmul>
cudaError_t launch_one_row(const QuantizedMatmulParams& params, cudaStream_t stream, int warps) {
  typename Matmul::Params p = {};
  p.x = static_cast<const typename Matmul::T*>(params.x);
  p.out = static_cast<typename Matmul::Out*>(params.out);
  p.weight = params.w;
  p.tile_bytes = params.w.tile_bytes();
  p.N = static_cast<int>(params.N);
  p.K = static_cast<int>(params.K);
  p.strips = static_cast<int>(tile::ceil_div(params.N, kFourBitRows));
  p.panels = static_cast<int>(tile::ceil_div(params.K, kFourBitColumns));
  return launch(quantized_matmul_one_row_kernel<Matmul>, params.B * p.strips,
                warps * tile::kWarpSize, 0, stream, p);
}

// --- Few and some rows ---------------------------------------------------------------------------

// How a product is cut up.
struct FourBitPlan {
  int strips;  // of 16 rows of weights, that a block has of a tile
  int panels;  // of 128 columns, of a stage
  int shared;  // of these strips: two blocks of a cluster have these, each for half of K
  double us;   // that it takes, an estimate

  int own() const { return strips - shared; }
  int blocks() const { return shared > 0 ? 2 : 1; }  // that have a tile
  int tile_strips() const { return blocks() * own() + shared; }
};

// The sizes of a product in tiles of weights.
struct FourBitSizes {
  int64_t strips, panels;
  double strip_bytes, x_bytes;

  FourBitSizes(const QuantizedMatmulParams& p, int64_t tokens)
      : strips(tile::ceil_div(p.N, kFourBitRows)),
        panels(tile::ceil_div(p.K, kFourBitColumns)),
        strip_bytes(static_cast<double>(panels) * p.w.tile_bytes()),
        x_bytes(static_cast<double>(tokens * p.K) * 2) {}
};

// Estimates: bytes that memory, and a multiprocessor, reads in 1 us; us for a launch, for the end
// of a tile, and to meet another block. NOTE: those of an H200.
inline constexpr double kFourBitMemory = 4.4e6, kFourBitMultiprocessor = 85e3;
inline constexpr double kFourBitLaunch = 3.0, kFourBitTile = 0.7, kFourBitSplit = 0.5;

// Of the plan's tiles, whose products take so long in each of `rounds`.
inline double four_bit_us(const FourBitSizes& sizes, const FourBitPlan& plan, int64_t rounds,
                          double products, int multiprocessors) {
  const double times = static_cast<double>(rounds);
  const double weights = times * (plan.own() + plan.shared / 2.0) * sizes.strip_bytes;
  const double x = times * sizes.x_bytes / (plan.own() > 0 ? 1 : 2);
  const double even = weights * multiprocessors / kFourBitMemory;
  const double reads = (weights + x) / kFourBitMultiprocessor;
  return kFourBitLaunch + std::max({even, reads, times * products}) + kFourBitTile * times +
         kFourBitSplit * (plan.blocks() - 1);
}

// How long warpgroups of a multiprocessor take for four strips each of a panel.
inline double some_rows_step_us(int tokens, int warpgroups) {
  return 0.1 + warpgroups * (0.1 + 0.0017 * tokens);
}

// The fastest plan for few rows. A tile has so many strips that all multiprocessors have equally
// many, and a stage as many panels as leave least beyond the end of K while half of the consumers
// have work.
template <class Matmul>
FourBitPlan few_rows_plan(const QuantizedMatmulParams& p, int multiprocessors) {
  const FourBitSizes sizes(p, Matmul::kTokens);
  FourBitPlan best = {0, 0, 0, INFINITY};
  for (int strips = 1; strips <= 16; ++strips) {
    int panels = 1;
    int64_t least = INT64_MAX;
    for (int count = tile::ceil_div(Matmul::kConsumers / 2, strips);
         count * strips <= Matmul::kConsumers; ++count) {
      const int64_t with_rest = tile::ceil_div(sizes.panels, count) * count;
      if (with_rest < least) panels = count, least = with_rest;
    }
    const int64_t tiles = p.B * tile::ceil_div(sizes.strips, strips);
    const int64_t rounds = tile::ceil_div(tiles, multiprocessors);
    FourBitPlan plan = {strips, panels, 0, 0.0};
    plan.us = four_bit_us(sizes, plan, rounds, 0.0, multiprocessors);
    if (plan.us < best.us) best = plan;
  }
  return best;
}

// Of a stage: weights, and `rows` of x; swizzles repeat after 1,024.
inline int stage_bytes(int rows, int strips, int panels, int tile_bytes) {
  const int bytes = panels * (2 * rows * tile::kPanelBytes + strips * tile_bytes);
  return tile::ceil_div(bytes, 1024) * 1024;
}

// The same for some rows, where warps beyond a tile's strips have nothing to do, and clusters only
// one tile. Of equally fast plans that with most strips, which reads x least often.
// NOTE: with two stages 64 rows of x took half as long again, with three 32 rows a tenth longer.
template <class Matmul>
FourBitPlan some_rows_plan(const QuantizedMatmulParams& p, int multiprocessors) {
  constexpr int kStages = Matmul::kTokens == 64 ? 3 : 4;  // that there is room for
  const FourBitSizes sizes(p, Matmul::kTokens);
  FourBitPlan best = {0, 0, 0, INFINITY};
  const auto consider = [&](int strips, int shared) {
    FourBitPlan plan = {strips, 0, shared, 0.0};
    const int64_t tiles = p.B * tile::ceil_div(sizes.strips, plan.tile_strips());
    const int64_t rounds = tile::ceil_div(tiles, multiprocessors / plan.blocks());
    if (shared > 0 && rounds > 1) return;
    const int groups = tile::ceil_div(strips, 4), own_groups = tile::ceil_div(plan.own(), 4);
    const int splits = plan.own() > 0 ? 1 : 2;
    int panels = Matmul::kConsumers / groups;
    const auto too_many = [&] {
      return panels > tile::ceil_div<int64_t>(sizes.panels, splits) ||
             kStages * stage_bytes(Matmul::kTokens, strips, panels, p.w.tile_bytes()) >
                 Matmul::kStageBytes;
    };
    while (panels > 1 && too_many()) --panels;
    plan.panels = panels;
    const double steps = static_cast<double>(tile::ceil_div(sizes.panels, panels)) / 2;
    const auto half = [&](int groups) {  // of K
      return groups > 0 ? steps * some_rows_step_us(Matmul::kTokens, groups * panels) : 0.0;
    };
    const double products = half(groups) + half(shared > 0 ? own_groups : groups);
    plan.us = four_bit_us(sizes, plan, rounds, products, multiprocessors);
    if (plan.us <= best.us) best = plan;
  };
  for (int strips = 1; strips <= Matmul::kMaxStrips; ++strips) consider(strips, 0);
  for (int strips = 1; strips <= Matmul::kMaxStrips; ++strips) {
    for (int own = 0; own < strips; own += 4) consider(strips, strips - own);
  }
  return best;
}

// Of weights, on their way to a multiprocessor at once.
inline constexpr int kBytesAhead = 48 << 10;

// What kernels for few and some rows have of a product.
template <class Matmul>
cudaError_t fill_stream(typename Matmul::Params* p, const QuantizedMatmulParams& params,
                        const FourBitPlan& plan) {
  constexpr int kRows = Matmul::kTokens;
  const FourBitSizes sizes(params, kRows);
  p->weight = params.w;
  p->tile_bytes = params.w.tile_bytes();
  p->B = static_cast<int>(params.B);
  p->M = static_cast<int>(params.M);
  p->N = static_cast<int>(params.N);
  p->K = static_cast<int>(params.K);
  p->strips = plan.strips;
  p->panels = plan.panels;
  p->own = plan.own();
  p->shared = plan.shared;
  p->tile_strips = plan.tile_strips();
  p->tiles = static_cast<int>(tile::ceil_div(sizes.strips, p->tile_strips));
  p->steps = static_cast<int>(tile::ceil_div(sizes.panels, plan.panels));
  p->x_box = 2 * plan.panels;
  p->x_bytes = kRows * tile::kPanelBytes;
  p->w_place = p->x_box * p->x_bytes;
  p->own_bytes = p->own * plan.panels * p->tile_bytes;
  p->shared_bytes = p->shared * plan.panels * p->tile_bytes;
  p->stage_bytes = stage_bytes(kRows, plan.strips, plan.panels, p->tile_bytes);
  p->stages = std::min(Matmul::kMaxStages, Matmul::kStageBytes / p->stage_bytes);
  p->ahead = std::min(p->stages, tile::ceil_div(kBytesAhead, p->own_bytes + p->shared_bytes));
  if (p->stages < 2) return cudaErrorInvalidValue;
  if (cudaError_t error = make_panel_map(&p->x, tensor_map_type<typename Matmul::T>(), params.x,
                                         params.B * params.M, params.K, kRows, &p->x_box))
    return error;
  const auto make_map = [&](CUtensorMap* map, int strips) {
    if (strips == 0) return cudaSuccess;
    return make_block_map(map, params.w.data, params.B * sizes.strips, sizes.panels, p->tile_bytes,
                          strips, plan.panels);
  };
  if (cudaError_t error = make_map(&p->w, p->own)) return error;
  return make_map(&p->w_shared, p->shared);
}

template <class Matmul>
cudaError_t launch_few_rows_plan_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                      const FourBitPlan& plan) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  if (params.M > Matmul::kTokens || plan.strips * plan.panels > Matmul::kConsumers) {
    return cudaErrorInvalidValue;
  }
  typename Matmul::Params p = {};
  p.out = static_cast<typename Matmul::Out*>(params.out);
  if (cudaError_t error = fill_stream<Matmul>(&p, params, plan)) return error;
  const int64_t blocks = std::min<int64_t>(params.B * p.tiles, multiprocessors);
  return launch(quantized_matmul_few_rows_sm90_kernel<Matmul>, blocks, Matmul::kThreads,
                Matmul::kSharedBytes, stream, p);
}

template <class Matmul>
cudaError_t launch_some_rows_plan_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                       const FourBitPlan& plan) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  typename Matmul::Params p = {};
  p.out = static_cast<typename Matmul::Out*>(params.out);
  p.groups = tile::ceil_div(plan.strips, 4);
  if (params.M > Matmul::kTokens || plan.strips > Matmul::kMaxStrips ||
      p.groups * plan.panels > Matmul::kConsumers || (plan.shared > 0 && plan.own() % 4 > 0)) {
    return cudaErrorInvalidValue;
  }
  if (cudaError_t error = fill_stream<Matmul>(&p, params, plan)) return error;
  const int64_t tiles = params.B * p.tiles;
  const bool clusters = p.shared > 0;
  const int64_t blocks = clusters ? 2 * tiles : std::min<int64_t>(tiles, multiprocessors);
  return launch_clusters(quantized_matmul_some_rows_sm90_kernel<Matmul>, blocks, clusters ? 2 : 0,
                         Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// --- Many rows -----------------------------------------------------------------------------------

// Rows of tiles of clusters that are worked through together, so that L2 keeps what they share.
inline constexpr int kFourBitGroup = 4;

// Rows of tiles of clusters, from the first to before the end.
struct TileRows {
  int first, end;
};
template <class Matmul>
TileRows all_tile_rows(const QuantizedMatmulParams& p) {
  const int64_t rows = Matmul::kGradient ? p.K : p.N;
  return {
      0, static_cast<int>(tile::ceil_div<int64_t>(rows, Matmul::kRows * Matmul::Cluster::kBlocks))};
}

// The part of Matmul's product, or gradient, that such rows of tiles are.
template <class Matmul>
cudaError_t launch_tile_rows_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                  TileRows which, int group = kFourBitGroup) {
  using Cluster = typename Matmul::Cluster;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t rows = Matmul::kGradient ? K : N, depth = Matmul::kGradient ? N : K;
  typename Matmul::Params p = {};
  p.weight = params.w;
  p.sum_scale = params.sum_scale;
  p.tile_bytes = params.w.tile_bytes();
  p.B = static_cast<int>(B);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.squares = static_cast<int>(tile::ceil_div(depth, Matmul::kRows));
  if (cudaError_t error = make_matrix_map(&p.x, tensor_map_type<typename Matmul::T>(), params.x,
                                          B * M, depth, Matmul::kTokens / Cluster::kBlocks))
    return error;
  if (cudaError_t error = make_batched_block_map(
          &p.w, params.w.data, B, tile::ceil_div(N, kFourBitRows),
          tile::ceil_div(K, kFourBitColumns), p.tile_bytes, Matmul::kStrips, 1))
    return error;
  if (cudaError_t error = make_tensor_map(&p.out, tensor_map_type<typename Matmul::Out>(),
                                          params.out, B, M, 1, rows, Matmul::kPiece))
    return error;
  if constexpr (Matmul::kRowFactors) {
    const auto* pairs = static_cast<const float*>(params.row_factor);
    if (cudaError_t error = make_row_map(&p.factors, pairs, B, N / 2, Matmul::kRows / 2))
      return error;
  }
  p.first_row = which.first;
  p.order = {
      .rows = which.end - which.first,
      .cols = static_cast<int>(tile::ceil_div(M, Matmul::kTokens)),
      .group = group,
  };
  const int clusters = std::min(p.B * p.order.count(), multiprocessors / Cluster::kBlocks);
  return launch(quantized_matmul_sm90_kernel<Matmul>, int64_t{clusters} * Cluster::kBlocks,
                Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// All of it.
template <class Matmul>
cudaError_t launch_four_bit_sm90(const QuantizedMatmulParams& params, cudaStream_t stream,
                                 int group = kFourBitGroup) {
  return launch_tile_rows_sm90<Matmul>(params, stream, all_tile_rows<Matmul>(params), group);
}

// How long the kernel takes, in tiles of 256 tokens on the busiest multiprocessor.
//
// NOTE: on an H200 a tile of 128 tokens takes 0.56 of the time of one of 256, of the gradient 0.65.
template <class Matmul>
double four_bit_tiles(const QuantizedMatmulParams& p, TileRows which, int multiprocessors) {
  constexpr double kTime = Matmul::kTokens == 256 ? 1.0 : Matmul::kGradient ? 0.65 : 0.56;
  const int64_t high = which.end - which.first;
  const int64_t tiles = p.B * high * tile::ceil_div<int64_t>(p.M, Matmul::kTokens);
  return kTime *
         static_cast<double>(tile::ceil_div(tiles, multiprocessors / Matmul::Cluster::kBlocks));
}

// How many rows of tiles are fastest by tiles of 256 tokens, from the first on, if the others are
// by tiles of 128: all, none, or as many as fill whole rounds of all multiprocessors.
template <class Wide, class Middle>
int rows_of_wide_tiles(const QuantizedMatmulParams& p, int multiprocessors) {
  static_assert(Wide::kRows == Middle::kRows && Wide::Cluster::kBlocks == Middle::Cluster::kBlocks);
  constexpr double kLaunch = 0.05;  // a second kernel, in tiles of 256 tokens
  const int end = all_tile_rows<Wide>(p).end;
  const auto time = [&](int wide) {
    return four_bit_tiles<Wide>(p, {0, wide}, multiprocessors) +
           four_bit_tiles<Middle>(p, {wide, end}, multiprocessors) +
           (wide > 0 && wide < end ? kLaunch : 0.0);
  };
  const int64_t clusters = multiprocessors / Wide::Cluster::kBlocks;
  const int64_t each = p.B * tile::ceil_div<int64_t>(p.M, Wide::kTokens);  // tiles of a row of them
  const int whole = static_cast<int>(end * each / clusters * clusters / each);
  const auto faster = [&](int x, int y) { return time(x) < time(y); };
  return std::min({end, 0, whole}, faster);
}

// By tiles of both sizes, one kernel after the other, or by those of one.
template <class Wide, class Middle>
cudaError_t launch_many_rows(const QuantizedMatmulParams& p, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int wide = rows_of_wide_tiles<Wide, Middle>(p, multiprocessors);
  const int end = all_tile_rows<Wide>(p).end;
  if (wide > 0) {
    if (cudaError_t error = launch_tile_rows_sm90<Wide>(p, stream, {0, wide})) return error;
  }
  return wide < end ? launch_tile_rows_sm90<Middle>(p, stream, {wide, end}) : cudaSuccess;
}

// By the fastest of all kernels.
template <FourBitFormat kFormat, class T, class Out>
cudaError_t launch_four_bit_of_sm90(const QuantizedMatmulParams& params, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const auto few = [&]<int kTokens>() {
    using Matmul = QuantizedMatmulFewRows<kFormat, T, Out, kTokens>;
    const FourBitPlan plan = few_rows_plan<Matmul>(params, multiprocessors);
    return launch_few_rows_plan_sm90<Matmul>(params, stream, plan);
  };
  if (params.M == 1) {
    using Matmul = QuantizedMatmulOneRow<kFormat, T, Out>;
    return launch_one_row<Matmul>(params, stream, one_row_warps<Matmul>(params, multiprocessors));
  }
  if (params.M <= 8) return few.template operator()<8>();
  if (params.M <= 16) return few.template operator()<16>();
  const auto some = [&]<int kTokens>() {
    using Matmul = QuantizedMatmulSomeRows<kFormat, T, Out, kTokens>;
    const FourBitPlan plan = some_rows_plan<Matmul>(params, multiprocessors);
    return launch_some_rows_plan_sm90<Matmul>(params, stream, plan);
  };
  if (params.M <= 32) return some.template operator()<32>();
  if (params.M <= 64) return some.template operator()<64>();
  return launch_many_rows<QuantizedMatmul<kFormat, T, Out, 256>,
                          QuantizedMatmul<kFormat, T, Out, 128>>(params, stream);
}

// --- Gradient ------------------------------------------------------------------------------------

// With few rows of x there is no kernel of its own.
template <FourBitFormat kFormat, class T, class Out>
cudaError_t launch_four_bit_grad_of_sm90(const QuantizedMatmulParams& params, cudaStream_t stream) {
  return launch_many_rows<QuantizedMatmul<kFormat, T, Out, 256, true>,
                          QuantizedMatmul<kFormat, T, Out, 128, true>>(params, stream);
}

}  // namespace jaxkern

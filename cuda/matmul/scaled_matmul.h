// Launches one instance of a kernel of products of scaled 8-bit matrices.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/matmul/scaled_matmul_sm90.cuh"
#include "cuda/matmul/tensor_maps.h"

namespace jaxkern {

// Without promotion all columns of a tile are one product, which reads lhs from shared memory once;
// with it, there are registers for two products of half of them, and blocks need not wait for each
// other. Room for a whole result is worth a stage, except where the sums take longest.
constexpr ScaledMatmulConfig scaled_matmul_config(BlockScales scales, bool fast_accumulation) {
  if (fast_accumulation) {
    return {.consumers = 2, .waves = 1, .block_n = 256, .stages = 4, .blocks = 2, .pieces = 2};
  }
  if (scales == BlockScales::k1x128By1x128) {
    return {.consumers = 2, .waves = 2, .block_n = 128, .stages = 4, .blocks = 2, .pieces = 1};
  }
  return {.consumers = 2, .waves = 2, .block_n = 128, .stages = 3, .blocks = 1, .pieces = 4};
}

// With promotion, tiles of 192 rows: two consumers add while a third multiplies.
constexpr ScaledMatmulConfig kThreeConsumers = {
    .consumers = 3, .waves = 1, .block_n = 128, .stages = 4, .blocks = 2, .pieces = 2};

// Without promotion, consumers that take turns: one ends a tile while the other multiplies.
constexpr ScaledMatmulConfig ping_pong_config(int block_n) {
  return {.consumers = 2,
          .waves = 2,
          .block_n = block_n,
          .stages = 4,
          .blocks = 2,
          .pieces = 3,
          .ping_pong = true};
}

// Rows of tiles of clusters that are worked through together, so that L2 keeps what they share.
inline constexpr int kGroup = 8;

// What the kernel takes besides the order of tiles and, of columns, scales and bias: copies of
// `lhs_box`, `rhs_box` and `out_box` rows.
template <class Matmul>
cudaError_t fill_params(typename Matmul::Params* p, const ScaledMatmulParams& params, int lhs_box,
                        int rhs_box, int out_box) {
  constexpr auto kByte = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  constexpr auto kOut = tensor_map_type<typename Matmul::Out>();
  const int64_t B = params.B, M = params.M, N = params.N, K = params.K;
  const int64_t K_blocks = scale_blocks(K);
  if (cudaError_t error = make_matrix_map(&p->lhs, kByte, params.lhs, B * M, K, lhs_box))
    return error;
  if (cudaError_t error = make_matrix_map(&p->rhs, kByte, params.rhs, B * N, K, rhs_box))
    return error;
  if (cudaError_t error = make_tensor_map(&p->out, kOut, params.out, B, M, 1, N, out_box))
    return error;
  if constexpr (Matmul::kScales != BlockScales::kNone) {
    if (cudaError_t error = make_row_map(&p->lhs_rows, params.lhs_scale, B * K_blocks,
                                         padded_scale_row(M), Matmul::kBlockM))
      return error;
  }
  p->lhs_scale = params.lhs_scale;
  p->rhs_scale = params.rhs_scale;
  p->bias = params.bias;
  p->lhs_scale_step = params.lhs_scaling == Scaling::kRow;
  p->rhs_scale_step = params.rhs_scaling == Scaling::kRow;
  p->M = static_cast<int>(M);
  p->N = static_cast<int>(N);
  p->K_blocks = static_cast<int>(K_blocks);
  return cudaSuccess;
}

template <class Matmul>
cudaError_t launch_scaled_matmul_sm90(const ScaledMatmulParams& params, cudaStream_t stream,
                                      int group = kGroup) {
  using Cluster = typename Matmul::Cluster;
  constexpr int kLhsShare = Matmul::kSharesLhs ? Cluster::kBlocks : 1;
  constexpr int kRhsShare = Matmul::kSharesLhs ? 1 : Cluster::kBlocks;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  typename Matmul::Params p = {};
  if (cudaError_t error = fill_params<Matmul>(&p, params, Matmul::kBlockM / kLhsShare,
                                              Matmul::kBlockN / kRhsShare, 64))
    return error;
  if (Matmul::kRhsBlocks || p.rhs_scale_step) {
    const int64_t rows = Matmul::kRhsBlocks ? params.B * p.K_blocks : params.B;
    const int64_t cols = Matmul::kRhsBlocks ? padded_scale_row(params.N) : params.N;
    if (cudaError_t error =
            make_row_map(&p.rhs_rows, params.rhs_scale, rows, cols, Matmul::kBlockN))
      return error;
  }
  if (params.bias != nullptr) {
    if (cudaError_t error = make_row_map(&p.bias_row, params.bias, 1, params.N, Matmul::kBlockN))
      return error;
  }
  p.order = {
      .rows = tile::ceil_div(p.M, Matmul::kClusterM),
      .cols = tile::ceil_div(p.N, Matmul::kClusterN),
      .group = group,
  };
  p.B = static_cast<int>(params.B);
  const int clusters = std::min(p.B * p.order.count(), multiprocessors / Cluster::kBlocks);
  return launch(scaled_matmul_sm90_kernel<Matmul>, int64_t{clusters} * Cluster::kBlocks,
                Matmul::kThreads, Matmul::kSharedBytes, stream, p);
}

// The elements of out, with those that tiles have beyond its ends and those of idle SMs, that an SM
// makes.
template <class Matmul>
int64_t elements_of_each_sm(const ScaledMatmulParams& p, int multiprocessors) {
  const int64_t rows = tile::ceil_div<int64_t>(p.M, Matmul::kClusterM);
  const int64_t cols = tile::ceil_div<int64_t>(p.N, Matmul::kClusterN);
  const int64_t clusters = multiprocessors / Matmul::Cluster::kBlocks;
  return tile::ceil_div(p.B * rows * cols, clusters) * Matmul::kBlockM * Matmul::kBlockN;
}

// The time that an element takes in tiles of a kind, of any unit: that of its products, and its
// part of the end of a tile, as long as that of so much K, unless that is hidden.
struct ElementTime {
  double products, end;

  double of(int64_t K) const { return products * static_cast<double>(K) + end; }
};

// By the kernel whose busiest SM is done first.
template <class... Matmuls>
cudaError_t launch_fastest_sm90(const ScaledMatmulParams& params, cudaStream_t stream,
                                const ElementTime (&times)[sizeof...(Matmuls)]) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t elements[] = {elements_of_each_sm<Matmuls>(params, multiprocessors)...};
  const auto time = [&](size_t i) {
    return static_cast<double>(elements[i]) * times[i].of(params.K);
  };
  size_t fastest = 0;
  for (size_t i = 1; i < sizeof...(Matmuls); ++i) {
    if (time(i) < time(fastest)) fastest = i;
  }
  using Launch = cudaError_t (*)(const ScaledMatmulParams&, cudaStream_t, int);
  constexpr Launch kLaunches[] = {launch_scaled_matmul_sm90<Matmuls>...};
  return kLaunches[fastest](params, stream, kGroup);
}

// NOTE: on an H200 three consumers take 98% of the time of two, or 95% where both operands have
// scales of 1x128 blocks.
template <class Lhs, class Rhs, class Out, BlockScales kScales>
cudaError_t launch_promoted_sm90(const ScaledMatmulParams& params, cudaStream_t stream) {
  using Two = ScaledMatmul<Lhs, Rhs, Out, kScales, false, scaled_matmul_config(kScales, false)>;
  using Three = ScaledMatmul<Lhs, Rhs, Out, kScales, false, kThreeConsumers>;
  constexpr double kOfThree = kScales == BlockScales::k1x128By1x128 ? 0.95 : 0.98;
  return launch_fastest_sm90<Two, Three>(params, stream, {{1.0, 0.0}, {kOfThree, 0.0}});
}
// NOTE: turns hide the ends of tiles, but their tiles are narrower: on an H200 they take 0.88 of
// the time of an element at K = 1536, 0.97 at 4096, as long at 8192 and 1.02 at 28672.
template <class Lhs, class Rhs, class Out>
cudaError_t launch_fast_sm90(const ScaledMatmulParams& params, cudaStream_t stream) {
  constexpr auto kNone = BlockScales::kNone;
  using Together = ScaledMatmul<Lhs, Rhs, Out, kNone, true, scaled_matmul_config(kNone, true)>;
  using Turns192 = ScaledMatmul<Lhs, Rhs, Out, kNone, true, ping_pong_config(192)>;
  using Turns176 = ScaledMatmul<Lhs, Rhs, Out, kNone, true, ping_pong_config(176)>;
  return launch_fastest_sm90<Together, Turns192, Turns176>(
      params, stream, {{1.0, 256.0}, {1.03, 0.0}, {1.025, 0.0}});
}

}  // namespace jaxkern

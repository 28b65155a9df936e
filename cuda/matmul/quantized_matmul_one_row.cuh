// out = x w^T for weights of four bits and one row of x, where reading weights takes the time.
//
// A block has a strip of 16 rows of weights, whose tiles go round among its warps; two of a warp's
// are on their way from memory to its registers, with what it needs of x. Many small blocks with
// nothing between memory and registers start sooner than a ring in shared memory, and end sooner.
//
// mma.m16n8k16 multiplies 16 columns of a tile, a step, in which column s of its operand x has what
// step s multiplies, and all others zeros. So a tile's sums of steps are columns of one result, and
// it is those that are multiplied by scales of blocks, a quarter of what a lane has in values.
#pragma once

#include "cuda/matmul/four_bit.cuh"
#include "cuda/tile/ptx/copy.cuh"
#include "cuda/tile/ptx/matrix.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class T_, class Out_>
struct QuantizedMatmulOneRow {
  using T = T_;
  using Out = Out_;
  using Scales = FourBitSums<kFormat, T>;
  static constexpr int kMaxWarps = 16;       // of a block
  static constexpr int kResidentWarps = 32;  // of a multiprocessor
  static constexpr int kAhead = 2;           // tiles of a warp on their way
  static constexpr int kSteps = kFourBitColumns / 16;

  struct Params {
    const T* x;  // (B, K)
    Out* out;    // (B, N)
    FourBitWeight weight;
    int tile_bytes;
    int N, K, strips, panels;  // strips: of a matrix
  };
  struct Shared {
    float sums[kMaxWarps][kFourBitRows];
  };

  // What a lane has of a tile, and of x: its columns of step g.
  struct Tile {
    uint4 values[2];
    Scales scales;
    uint32_t x[2];
  };

  __device__ __forceinline__ static void load(const Params& p, const char* from, const T* x,
                                              int panel, Tile& tile) {
    if (panel >= p.panels) return;
    const int lane = threadIdx.x % tile::kWarpSize, g = lane / 4, c = lane % 4;
    from += panel * p.tile_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.values[half] = tile::ptx::load_once(reinterpret_cast<const uint4*>(from) +
                                               tile::kWarpSize * half + lane);
    }
    tile.scales.load(p.weight, from + kFourBitValueBytes);
    const int col = panel * kFourBitColumns + 16 * g + 2 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tile.x[i] = col + 8 * i < p.K ? *reinterpret_cast<const uint32_t*>(x + col + 8 * i) : 0;
    }
  }

  // sums[row / 8] += those of the tile over the lane's steps, of x times `larger`.
  __device__ __forceinline__ static void add(const Tile& tile, const int (&own)[kSteps],
                                             uint32_t larger, float (&sums)[2]) {
    uint32_t x[2] = {tile.x[0], tile.x[1]};
    if constexpr (Scales::kLarger != Scales::kOne) {
#pragma unroll
      for (uint32_t& pair : x) as_pair<T>(pair) = __hmul2(as_pair<T>(pair), as_pair<T>(larger));
    }
    float part[4] = {}, x_sums[4] = {};  // [row / 8][step % 2]
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
      Scales::expand(word_of(tile.values, s), a);
      multiply(part, a, {x[0] * own[s], x[1] * own[s]});
    }
    if constexpr (Scales::kZeros) {
      constexpr uint32_t kOne = Scales::kOne;
      multiply(x_sums, {kOne, kOne, kOne, kOne}, x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i / 2] += tile.scales.finish(part[i], x_sums[i], i / 2, i % 2);
    }
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    tile::ptx::mma_m16n8k16<tile::ElementType<T>>(sum, a[0], a[1], a[2], a[3], b[0], b[1]);
  }

  __device__ __forceinline__ static void run(const Params& p, Shared& shared) {
    const int lane = threadIdx.x % tile::kWarpSize, g = lane / 4, c = lane % 4;
    const int warp = threadIdx.x / tile::kWarpSize, warps = blockDim.x / tile::kWarpSize;
    const int batch = blockIdx.x / p.strips, strip = blockIdx.x - batch * p.strips;
    const int64_t bytes = int64_t{p.panels} * p.tile_bytes;
    const char* from = static_cast<const char*>(p.weight.data) + blockIdx.x * bytes;
    const T* x = p.x + int64_t{batch} * p.K;

    int own[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      own[s] = g == s;
      // Or the compiler makes a choice of a product, for the pipe that has most to do.
      tile::ptx::work_out_here(own[s]);
    }
    // Of the row that the thread finishes: read here, so that nobody waits for it at the end.
    const int row = threadIdx.x, n = strip * kFourBitRows + row;
    const bool mine = row < kFourBitRows && n < p.N;
    const float scale = mine ? p.weight.row_scale[int64_t{blockIdx.x} * kFourBitRows + row] : 0.0f;

    float sums[2];
    uint32_t larger = Scales::kLarger;
    for (bool again = true; again; larger = Scales::kOne) {
      sums[0] = sums[1] = 0.0f;
      Tile tiles[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(p, from, x, warp + i * warps, tiles[i]);
#pragma unroll 1
      for (int panel = warp; panel < p.panels; panel += kAhead * warps) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (panel + i * warps >= p.panels) break;
          add(tiles[i], own, larger, sums);
          load(p, from, x, panel + (kAhead + i) * warps, tiles[i]);
        }
      }
      if (larger == Scales::kOne) sums[0] *= Scales::kLargerBy, sums[1] *= Scales::kLargerBy;
      // Where x is 2^66 or more, nothing larger is finite.
      const bool finite = isfinite(sums[0]) && isfinite(sums[1]);
      again = larger != Scales::kOne && !__all_sync(0xffffffffu, finite);
    }

    // A thread for each row adds up what warps have, always in the same order.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = tile::warp_sum(sums[i], 4);
      if (c == 0) shared.sums[warp][g + 8 * i] = sums[i];
    }
    __syncthreads();
    if (!mine) return;
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += shared.sums[i][row];
    p.out[int64_t{batch} * p.N + n] = static_cast<Out>(sum * (scale * Scales::kSumScale));
  }
};

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kMaxWarps* tile::kWarpSize,
                                  Matmul::kResidentWarps / Matmul::kMaxWarps)
    quantized_matmul_one_row_kernel(const __grid_constant__ typename Matmul::Params p) {
  __shared__ typename Matmul::Shared shared;
  Matmul::run(p, shared);
}

}  // namespace jaxkern

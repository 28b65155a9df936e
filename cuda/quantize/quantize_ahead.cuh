// Quantisation of RmsNorm in tiles, where rstd is not given.
//
// Some turns of the blocks are units, which work out rstd of a panel of 128 rows a little ahead of
// its tiles. When those load, x is still in L2: it leaves memory once. Blocks are persistent, and
// the next tile of each comes to shared memory while it works on this one.
#pragma once

#include "cuda/quantize/quantize_tile.cuh"
#include "cuda/quantize/turns.cuh"

namespace jaxkern::quantize {

// rstd of panels of kTile rows, by a warp for each row.
template <class T>
struct RstdUnits {
  static constexpr int kRows = Threads<T>::kWarps;  // of a unit
  static constexpr int kPerPanel = kTile / kRows;
  static constexpr int kAtOnce = 8;  // loads of a thread

  static __device__ __forceinline__ void work(const QuantizeParams& p, int64_t unit, bool aligned) {
    const int lane = threadIdx.x % tile::kWarpSize;
    const int64_t row = unit * kRows + threadIdx.x / tile::kWarpSize;
    if (row >= p.rows) return;
    const auto* from = static_cast<const Bits<T>*>(p.inputs[0]) + row * p.cols;
    float sum = 0.0f;
    for (int64_t first = 0; first < p.cols; first += kAtOnce * tile::kWarpSize * kVec<T>) {
      Load<T> x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t col = first + (i * tile::kWarpSize + lane) * kVec<T>;
        x[i].load(from + col, inside(col, p.cols), aligned);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += sum_of_squares<T>(x[i]);
    }
    sum = tile::warp_sum(sum);
    if (lane == 0) p.rstd[row] = rstd_of(sum, p);
  }
};

// rstd alone.
template <class T>
__global__ void __launch_bounds__(Threads<T>::kThreads) rstd_kernel(const QuantizeParams p) {
  RstdUnits<T>::work(p, blockIdx.x, inputs_aligned<RmsNorm, T>(p));
}

template <class T>
__host__ __device__ __forceinline__ TurnOrder turn_order(const QuantizeParams& p) {
  const auto panels = static_cast<unsigned>(tile::ceil_div(p.rows, kTile));
  const auto tiles = static_cast<unsigned>(tile::ceil_div(p.cols, kTile));
  return {panels, RstdUnits<T>::kPerPanel, tiles, static_cast<unsigned>(p.lead)};
}

template <class T>
struct AheadMemory {
  StagedPatch<T> staged;
  TileMemory<T> tile;
  Draws::Shared drawn;
};

// p.rstd_in is p.rstd. p.progress: the counter of turns, then how many units of each panel are
// done.
template <class T, class F, Scaling kScaling, bool kAligned>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<RmsNorm, T, kAligned>)
    quantize_ahead_kernel(const QuantizeParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<AheadMemory<T>*>(shared);
  const bool aligned = kAligned || inputs_aligned<RmsNorm, T>(p);
  const TurnOrder order = turn_order<T>(p);
  int32_t* const progress = p.progress + 1;  // of panels

  auto start = [&](unsigned number) {
    if (number >= order.count()) return;
    const Turn turn = order.at(number);
    if (turn.is_unit) return;
    memory.staged.template start<kAligned>(p, Place<T>(p, turn.panel, turn.index));
  };
  Draws draws(p.progress, memory.drawn);
  draws.ask();
  unsigned now = draws.answer();
  start(now);
  __syncthreads();
  draws.ask();
  unsigned next = draws.answer();
  while (now < order.count()) {
    draws.ask();
    const Turn turn = order.at(now);
    if (turn.is_unit) {
      start(next);
      RstdUnits<T>::work(p, int64_t{turn.panel} * order.units + turn.index, aligned);
      unit_done(progress + turn.panel);
    } else {
      const Place<T> at(p, turn.panel, turn.index);
      Patch<T> x;
      tile::ptx::wait_all_copies_async();
      memory.staged.read(x);
      start(next);
      wait_for_units(progress + turn.panel, order.units);
      normalise<T>(x, p, at, aligned);
      quantize_tile<T, F, kScaling, kAligned>(x, at, p, p.outputs[0], memory.tile);
    }
    now = next;
    next = draws.answer();
  }
}

}  // namespace jaxkern::quantize

// Quantisation in tiles of 128 x 128: everything but rows in their natural orientation alone.
//
// Blocks are persistent and go from tile to tile. x is read once: the scales of blocks come from
// what was read; those of whole columns, and rstd, are worked out ahead (turns.cuh).
#pragma once

#include "cuda/quantize/ahead.cuh"
#include "cuda/quantize/quantize_tile.cuh"

namespace jaxkern::quantize {

template <class Source, class T>
struct TilesMemory {
  StagedPatches<Source, T> staged;
  TileMemory<T> tile;
  Draws::Shared drawn;
};

template <class Source, class T>
inline constexpr int kBlocksPerSm = Source::kThreadsPerSm / Threads<T>::kThreads;

// What turns are there. kRow: panels are columns of tiles, else rows of them.
template <class T, Scaling kScaling>
__host__ __device__ __forceinline__ TurnOrder turn_order(const QuantizeParams& p) {
  const auto rows = static_cast<unsigned>(tile::ceil_div(p.rows, kTile));
  const auto cols = static_cast<unsigned>(tile::ceil_div(p.cols, kTile));
  const auto lead = static_cast<unsigned>(p.lead);
  if (kScaling == Scaling::kRow) return {cols, rows, rows, lead};
  return {rows, p.progress != nullptr ? unsigned{RstdUnits<T>::kPerPanel} : 0, cols, lead};
}

template <class Source, class T, class F, Scaling kScaling, bool kAligned>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<Source, T>)
    quantize_tiles_kernel(const QuantizeParams p) {
  constexpr bool kColumns = kScaling == Scaling::kRow;
  constexpr int kOutputs = Source::kOutputs;
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<TilesMemory<Source, T>*>(shared);
  const bool aligned = kAligned || inputs_aligned<Source, T>(p);
  const TurnOrder order = turn_order<T, kScaling>(p);
  int32_t* const progress = p.progress + 1;  // of panels

  auto of_rstd = [&](const Turn& turn) { return kNormalises<Source> && !kColumns && turn.is_unit; };
  auto place = [&](const Turn& turn) {
    return kColumns ? Place<T>(p, turn.index, turn.panel) : Place<T>(p, turn.panel, turn.index);
  };
  auto start = [&](unsigned number) {
    if (number >= order.count()) return;
    const Turn turn = order.at(number);
    if (!of_rstd(turn)) memory.staged.template start<kAligned>(p, place(turn));
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
    if (of_rstd(turn)) {
      start(next);
      if constexpr (kNormalises<Source>) {
        RstdUnits<T>::work(p, int64_t{turn.panel} * order.units + turn.index, aligned);
      }
    } else {
      const Place<T> at = place(turn);
      Patch<T> x[kOutputs];
      memory.staged.read(x);
      start(next);
      if (order.units > 0 && !turn.is_unit) wait_for_units(progress + turn.panel, order.units);
      if constexpr (kNormalises<Source>) normalise<T>(x[0], p, at, aligned);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        __syncthreads();  // what the tile before used is free
        if (kColumns && turn.is_unit) {
          raise_columns<T>(p.outputs[o].workspace, p, x[o], at, memory.tile.columns);
        } else {
          quantize_tile<T, F, kScaling, kAligned>(x[o], at, p, p.outputs[o], memory.tile);
        }
      }
    }
    if (turn.is_unit) unit_done(progress + turn.panel);
    now = next;
    next = draws.answer();
  }
}

}  // namespace jaxkern::quantize

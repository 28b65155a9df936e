// Quantisation in tiles of 128 x 128, one of a block: everything but rows in their natural
// orientation alone, and rstd on the way (quantize_ahead.cuh).
//
// x is read once, and the scales of blocks come from what was read. Those of whole rows and columns
// take another kernel before. A thread issues all of its loads at once; 1024 threads of an SM, 4
// blocks or 2, have 128 KB of them under way. Sources with more to load have half the threads,
// twice the registers. Two matrices are cast one after the other.
// NOTE: persistent blocks, whose next tile comes to shared memory meanwhile, take 8 to 15% longer.
#pragma once

#include "cuda/quantize/quantize_tile.cuh"

namespace jaxkern::quantize {

template <class T>
__device__ __forceinline__ Place<T> place_of_tile(const QuantizeParams& p, unsigned tile) {
  const auto tiles_per_row = static_cast<unsigned>(tile::ceil_div(p.cols, kTile));
  return Place<T>(p, tile / tiles_per_row, tile % tiles_per_row);
}

template <class Source, class T>
struct TilesMemory {
  TileMemory<T> tile;
  Patches<Source, T> patches;
};

template <class Source, class T>
struct AmaxMemory {
  TileColumnMax<T> columns[Source::kOutputs];
  Patches<Source, T> patches;
};

// Raises the largest magnitudes of columns, and of rows in their natural orientation, which are
// in the workspace of each matrix and begin as zeros.
template <class Source, class T>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<Source, T>)
    quantize_amax_kernel(const QuantizeParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& [columns, patches] = *reinterpret_cast<AmaxMemory<Source, T>*>(shared);
  const bool aligned = inputs_aligned<Source, T>(p);
  const auto at = place_of_tile<T>(p, blockIdx.x);
  for_each_patch<Source, T>(patches, p, at, aligned, [&](int o, const Patch<T>& x) {
    const QuantizedMatrix& to = p.outputs[o];
    columns[o].write(x, at);
    if (to.values == nullptr) return;
    const auto amax = static_cast<int32_t>(RowMax<T>(x, at).amax);
    if (has_row(at)) atomicMax(row_maxima(p, to) + row_of_lane(at), amax);
  });
  __syncthreads();
  if (threadIdx.x >= kTile) return;
#pragma unroll
  for (int o = 0; o < Source::kOutputs; ++o) {
    raise_column<T>(p.outputs[o].workspace, threadIdx.x, p, at, columns[o]);
  }
}

// kRow: maxima are known. rstd is given.
template <class Source, class T, class F, Scaling kScaling, bool kAligned>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<Source, T, kAligned>)
    quantize_tiles_kernel(const QuantizeParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<TilesMemory<Source, T>*>(shared);
  const bool aligned = kAligned || inputs_aligned<Source, T>(p);
  // Backwards after quantize_amax_kernel: L2 still has what that read last.
  constexpr bool kBackwards = kScaling == Scaling::kRow;
  const auto at = place_of_tile<T>(p, kBackwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  // Loads of single elements take registers: fewer at once.
  constexpr int kAtOnce = Source::kRowsAtOnce / (kAligned ? 1 : Source::kOutputs);
  for_each_patch<Source, T, kAtOnce>(memory.patches, p, at, aligned, [&](int o, const Patch<T>& x) {
    quantize_tile<T, F, kScaling, kAligned, (Source::kInputs > 1)>(x, at, p, p.outputs[o],
                                                                   memory.tile);
  });
}

}  // namespace jaxkern::quantize

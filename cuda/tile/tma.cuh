// Tile copies by the tensor memory accelerator. A tensor map describes a rank-4 tensor
// (outermost first: batch, sequence, heads, head dim); a tile is a run of rows along the sequence
// of one head. Rows outside the tensor read as zero and are never written. One thread calls these.
#pragma once

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/copy.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::tile::tma {

struct Coordinate {
  int batch, row, head;
};

// Loads the whole tile, from column `col` on; `barrier` must expect Tile::kBytes.
template <class T, int kRows, int kCols>
__device__ __forceinline__ void load(SharedTile<T, kRows, kCols>& y, const CUtensorMap& x,
                                     Coordinate at, Barrier& barrier, int col = 0) {
  using Tile = SharedTile<T, kRows, kCols>;
#pragma unroll
  for (int p = 0; p < Tile::kPanels; ++p) {
    ptx::bulk_tensor_load(y.data + p * Tile::kPanelCols * kRows, &x, &barrier.word,
                          col + p * Tile::kPanelCols, at.head, at.row, at.batch);
  }
}

// Stores the whole tile or, if the map's box has fewer rows, that many rows from `row0` on.
template <class T, int kRows, int kCols>
__device__ __forceinline__ void store(const CUtensorMap& y, Coordinate at,
                                      const SharedTile<T, kRows, kCols>& x, int row0 = 0) {
  using Tile = SharedTile<T, kRows, kCols>;
#pragma unroll
  for (int p = 0; p < Tile::kPanels; ++p) {
    ptx::bulk_tensor_store(&y, x.data + (p * kRows + row0) * Tile::kPanelCols, p * Tile::kPanelCols,
                           at.head, at.row, at.batch);
  }
}

// Loads a box of a row of a rank-2 float32 tensor, from `col` on; the barrier must expect its
// bytes.
__device__ __forceinline__ void load(float* y, const CUtensorMap& x, int row, int col,
                                     Barrier& barrier) {
  ptx::bulk_tensor_load(y, &x, &barrier.word, col, row);
}

// y[i] += x[i] for `count` float32 values in global memory.
__device__ __forceinline__ void add(float* y, const float* x, int count) {
  ptx::bulk_reduce_add(y, x, count * sizeof(float));
}

// Closes this thread's group of stores and waits until they no longer read shared memory.
__device__ __forceinline__ void wait_stores_read() {
  ptx::bulk_commit();
  ptx::bulk_wait_read<0>();
}

// Orders this thread's writes to shared memory before a TMA store or an mma that another thread
// issues after the next barrier.
__device__ __forceinline__ void fence_writes() { ptx::fence_async_shared(); }

}  // namespace jaxkern::tile::tma

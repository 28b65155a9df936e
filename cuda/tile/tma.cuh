// Tile copies by the tensor memory accelerator. A tensor map describes a matrix, or a rank-4 tensor
// (outermost first: batch, sequence, heads, head dim), of which a tile is a run of rows along the
// sequence of one head. What lies outside the tensor reads as zero and is never written. One thread
// calls these.
#pragma once

#include <type_traits>

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/copy.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::tile::tma {

struct Coordinate {
  int batch, row, head;
};

// Where a tile begins in a matrix.
struct Corner {
  int row, col;
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

template <class T, int kRows, int kCols>
__device__ __forceinline__ void load(SharedTile<T, kRows, kCols>& y, const CUtensorMap& x,
                                     Corner at, Barrier& barrier) {
  using Tile = SharedTile<T, kRows, kCols>;
#pragma unroll
  for (int p = 0; p < Tile::kPanels; ++p) {
    ptx::bulk_tensor_load(y.data + p * Tile::kPanelCols * kRows, &x, &barrier.word,
                          at.col + p * Tile::kPanelCols, at.row);
  }
}

// Loads one tile into all blocks of a cluster. Each block calls this, brings its share to everyone,
// and expects Tile::kBytes at its own barrier. A share is some of the panels; where they are fewer
// than the blocks, some of the rows, and the map's box has that many.
template <class Cluster, class T, int kRows, int kCols, class At>
__device__ __forceinline__ void load_multicast(SharedTile<T, kRows, kCols>& y, const CUtensorMap& x,
                                               At at, Barrier& barrier) {
  using Tile = SharedTile<T, kRows, kCols>;
  constexpr int kShare = Tile::kPanels / Cluster::kBlocks;
  if constexpr (Cluster::kBlocks == 1) {
    load(y, x, at, barrier);
  } else if constexpr (kShare == 0) {
    constexpr int kShareRows = kRows / Cluster::kBlocks;
    static_assert(Tile::kPanels == 1 && kShareRows % 8 == 0, "the swizzle repeats every 8 rows");
    const int row = Cluster::rank() * kShareRows;
    ptx::bulk_tensor_load_multicast(y.data + row * Tile::kPanelCols, &x, &barrier.word, at.col,
                                    at.row + row, Cluster::kAll);
  } else {
    static_assert(kShare * Cluster::kBlocks == Tile::kPanels, "blocks must share evenly");
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int p = Cluster::rank() * kShare + i;
      T* panel = y.data + p * Tile::kPanelCols * kRows;
      const int col = p * Tile::kPanelCols;
      if constexpr (std::is_same_v<At, Corner>) {
        ptx::bulk_tensor_load_multicast(panel, &x, &barrier.word, at.col + col, at.row,
                                        Cluster::kAll);
      } else {
        ptx::bulk_tensor_load_multicast(panel, &x, &barrier.word, col, at.head, at.row, at.batch,
                                        Cluster::kAll);
      }
    }
  }
}

// Where panels of an 8-bit matrix begin, 128 columns each.
struct PanelCorner {
  int row, panel;
};

// Loads kPanels panels of `rows` rows by a map of make_panel_map() whose boxes have that many rows,
// and `box_panels` panels. They come to lie one after another at `y`. policy: of the L2 cache.
template <int kPanels, class T>
__device__ __forceinline__ void load_panels(T* y, const CUtensorMap& x, int box_panels, int rows,
                                            PanelCorner at, Barrier& barrier, uint64_t policy) {
  static_assert(sizeof(T) == 1, "a panel has 128 columns of 8 bits");
  if (kPanels > 1 && box_panels == kPanels) {
    ptx::bulk_tensor_load_by(policy, y, &x, &barrier.word, 0, at.row, at.panel);
  } else {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      ptx::bulk_tensor_load_by(policy, y + i * rows * kPanelBytes, &x, &barrier.word,
                               (at.panel + i) * kPanelBytes, at.row, 0);
    }
  }
}

// Stores the whole tile or, if the map's box has fewer rows, that many rows from `row0` on, to
// column `col`.
template <class T, int kRows, int kCols>
__device__ __forceinline__ void store(const CUtensorMap& y, Coordinate at,
                                      const SharedTile<T, kRows, kCols>& x, int row0 = 0,
                                      int col = 0) {
  using Tile = SharedTile<T, kRows, kCols>;
#pragma unroll
  for (int p = 0; p < Tile::kPanels; ++p) {
    ptx::bulk_tensor_store(&y, x.data + (p * kRows + row0) * Tile::kPanelCols,
                           col + p * Tile::kPanelCols, at.head, at.row, at.batch);
  }
}

template <class T, int kRows, int kCols>
__device__ __forceinline__ void store(const CUtensorMap& y, Corner at,
                                      const SharedTile<T, kRows, kCols>& x) {
  using Tile = SharedTile<T, kRows, kCols>;
#pragma unroll
  for (int p = 0; p < Tile::kPanels; ++p) {
    ptx::bulk_tensor_store(&y, x.data + p * Tile::kPanelCols * kRows, at.col + p * Tile::kPanelCols,
                           at.row);
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

// Closes this thread's group of stores and waits until at most kPending groups, the latest, still
// read shared memory.
template <int kPending = 0>
__device__ __forceinline__ void wait_stores_read() {
  ptx::bulk_commit();
  ptx::bulk_wait_read<kPending>();
}

// Waits until this thread's closed groups have reached global memory, and orders what it does next
// after them.
__device__ __forceinline__ void wait_stores() {
  ptx::bulk_wait<0>();
  ptx::fence_async();
}

// Orders this thread's writes to shared memory before a TMA store or an mma that another thread
// issues after the next barrier.
__device__ __forceinline__ void fence_writes() { ptx::fence_async_shared(); }

}  // namespace jaxkern::tile::tma

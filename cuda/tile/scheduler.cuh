// The order in which a grid works through tiles, and how its blocks share them out.
#pragma once

#include "cuda/tile/pipeline.cuh"

namespace jaxkern::tile {

// Tiles are numbered section by section; a section is a group of heads whose streamed operands stay
// in the L2 cache together. Inside a section row blocks are the slow axis, so that with causal
// masks, whose blocks differ in work, the longest blocks of all its heads come first.
struct TileOrder {
  int blocks;   // row blocks per head
  int heads;    // batch * heads, in all
  int section;  // heads per section, at least 1

  struct Tile {
    int block, head;
  };

  // 2^31 tiles of 64 rows and 64 columns would be 16 TiB of queries.
  __host__ __device__ int count() const { return blocks * heads; }

  __device__ __forceinline__ Tile at(int index) const {
    const int per_section = blocks * section;
    const int first = index / per_section * section;
    const int width = min(section, heads - first);
    const int rest = index % per_section;
    return {rest / width, first + rest % width};
  }
};

// The tiles of a matrix, column by column within groups of `group` rows. What runs at a time then
// covers about a square, which reads the fewest rows and columns of the operands.
struct MatrixOrder {
  int rows, cols;
  int group;  // at least 1

  struct Tile {
    int row, col;
  };

  __host__ __device__ int count() const { return rows * cols; }

  __device__ __forceinline__ Tile at(int index) const {
    const auto tile = TileOrder{cols, rows, group}.at(index);
    return {tile.head, tile.block};
  }
};

// In the shared memory of a persistent block: the numbers of its next tiles. One thread draws them,
// the warps of every other role read them. Blocks draw from one counter in global memory, so a tile
// goes to whoever is free first: no order that is fixed in advance balances every shape.
struct TileQueue {
  static constexpr int kStages = 2;
  Ring<kStages> ring;
  int index[kStages];

  __device__ __forceinline__ void init(int reading_warps) { ring.init(1, reading_warps); }
};

// Draws and hands out tiles. `counter` starts at zero; a block's first tile is its own number.
struct TileWriter {
  int* counter;
  int next = blockIdx.x;
  Slot<TileQueue::kStages> slot;

  __device__ __forceinline__ explicit TileWriter(int* counter) : counter(counter) {}

  // Hands out the next tile. A number past the last tile tells the readers to stop.
  __device__ __forceinline__ int put(TileQueue& queue) {
    slot.wait_empty(queue.ring);
    queue.index[slot.stage()] = next;
    queue.ring.full[slot.stage()].arrive();
    slot.advance();
    return next;
  }
  // Fetches the number for the next put(). It takes a trip to the L2 cache: ask early.
  __device__ __forceinline__ void draw() { next = gridDim.x + atomicAdd(counter, 1); }
};

// Reads tiles in the order in which they were handed out. All lanes of a warp call take().
struct TileReader {
  Slot<TileQueue::kStages> slot;

  __device__ __forceinline__ int take(TileQueue& queue) {
    slot.wait_full(queue.ring);
    const int index = queue.index[slot.stage()];
    queue.ring.empty[slot.stage()].arrive_warp();
    slot.advance();
    return index;
  }
};

}  // namespace jaxkern::tile

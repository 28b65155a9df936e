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

// Draws the tiles of a persistent block, one thread of it. Blocks draw from one counter in global
// memory, zero at the start, so a tile goes to whoever is free first: no order that is fixed in
// advance balances every shape. A block's first tile is its own number.
struct TileDraw {
  int* counter;
  int tile = blockIdx.x;

  __device__ __forceinline__ explicit TileDraw(int* counter) : counter(counter) {}

  // Fetches the next number. It takes a trip to the L2 cache: ask before it is needed.
  __device__ __forceinline__ void advance() { tile = gridDim.x + atomicAdd(counter, 1); }
};

// Items of work that one thread works out and every other role reads, in order. They stay in shared
// memory, where they cost no registers.
template <class Item>
struct WorkQueue {
  static constexpr int kStages = 2;
  Ring<kStages> ring;
  Item items[kStages];

  // readers: arrivals that release an item, one for each warp or thread that reads by itself.
  __device__ __forceinline__ void init(int readers) { ring.init(1, readers); }
};

// The two ends of a queue.
template <class Item>
struct WorkWriter {
  Slot<WorkQueue<Item>::kStages> slot;

  __device__ __forceinline__ void put(WorkQueue<Item>& queue, const Item& item) {
    slot.wait_empty(queue.ring);
    queue.items[slot.stage()] = item;
    queue.ring.full[slot.stage()].arrive();
    slot.advance();
  }
};

template <class Item>
struct WorkReader {
  Slot<WorkQueue<Item>::kStages> slot;

  // The next item, which stays until it is released.
  __device__ __forceinline__ const Item& take(WorkQueue<Item>& queue) const {
    slot.wait_full(queue.ring);
    return queue.items[slot.stage()];
  }
  // By a thread that reads alone.
  __device__ __forceinline__ void release(WorkQueue<Item>& queue) {
    queue.ring.empty[slot.stage()].arrive();
    slot.advance();
  }
  // By all lanes of a warp that reads as one.
  __device__ __forceinline__ void release_warp(WorkQueue<Item>& queue) {
    queue.ring.empty[slot.stage()].arrive_warp();
    slot.advance();
  }
};

}  // namespace jaxkern::tile

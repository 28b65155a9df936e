// The order in which a grid works through attention tiles (row block, head, batch).
#pragma once

namespace jaxkern::tile {

// The row blocks of one head follow one another, so that the blocks at work share few heads' keys
// and values, and those stay in the L2 cache.
struct TileOrder {
  int blocks;  // row blocks per head
  int heads;   // batch * heads, in all

  struct Tile {
    int block, head;
  };

  // 2^31 tiles of 64 rows and 64 columns would be 16 TiB of queries.
  __host__ __device__ int count() const { return blocks * heads; }

  __device__ __forceinline__ Tile at(int index) const { return {index % blocks, index / blocks}; }
};

// A persistent grid deals tiles out in rounds, every other round backwards: block b takes tiles
// b, 2 g - 1 - b, 2 g + b, ... of a grid of g, so that of tiles in descending order of work no
// block always gets the longest of its round.
struct SnakeScheduler {
  int count;
  int round = 0;

  __device__ __forceinline__ explicit SnakeScheduler(int tiles) : count(tiles) {}

  __device__ __forceinline__ int index() const {
    const int grid = gridDim.x, block = blockIdx.x;
    return round * grid + (round % 2 == 0 ? block : grid - 1 - block);
  }
  __device__ __forceinline__ bool done() const { return index() >= count; }
  __device__ __forceinline__ void advance() { ++round; }
};

}  // namespace jaxkern::tile

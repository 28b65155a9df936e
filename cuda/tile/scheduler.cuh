// The order in which a grid works through attention tiles (row block, head, batch).
#pragma once

namespace jaxkern::tile {

// Tiles are numbered section by section; a section is a group of heads whose keys and values stay
// in the L2 cache together. Inside a section row blocks are the slow axis, so that with causal
// masks (whose blocks differ in work) the longest blocks of all the section's heads come first.
// With section = 1 the blocks of one head follow one another.
struct TileOrder {
  int blocks;   // row blocks per head
  int heads;    // batch * heads, in all
  int section;  // heads per section; at least 1

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

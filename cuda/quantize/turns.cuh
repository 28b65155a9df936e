// How persistent blocks share out work of which some waits for other blocks.
//
// Blocks draw turns from a counter in memory, so that earlier turns are those of blocks which have
// started. Units are turns that work something out for a panel of tiles, and wait for nobody; the
// panel's tiles wait for them alone. A block has its turns in the order that it drew them, so the
// earliest turn that is not done can always go on: no order in which the GPU starts blocks hangs.
// With a lead that is as long as the GPU has blocks at work, the units are done when the tiles
// begin, and there is little to wait for.
//
//   turns   units of panels 0 .. lead - 1 | units of lead, tiles of 0 | units of lead + 1, ...
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/ptx/atomic.cuh"

namespace jaxkern::quantize {

struct Turn {
  bool is_unit;
  unsigned panel, index;  // of the units or of the tiles of the panel
};

struct TurnOrder {
  unsigned panels, units, tiles;  // of the last two those of a panel
  unsigned lead;                  // how many panels units are ahead

  __device__ __forceinline__ unsigned count() const { return panels * (units + tiles); }

  __device__ __forceinline__ Turn at(unsigned turn) const {
    const unsigned ahead = min(lead, panels), both = panels - ahead;
    if (turn < ahead * units) return {true, turn / units, turn % units};
    turn -= ahead * units;
    if (turn >= both * (units + tiles)) {
      turn -= both * (units + tiles);
      return {false, both + turn / tiles, turn % tiles};
    }
    const unsigned panel = turn / (units + tiles), rest = turn % (units + tiles);
    if (rest < units) return {true, panel + ahead, rest};
    return {false, panel, rest - units};
  }
};

// The turns of a block. All of its threads call, and synchronise between an answer and the next.
class Draws {
 public:
  using Shared = unsigned;

  __device__ __forceinline__ Draws(int32_t* counter, Shared& shared)
      : counter_(counter), shared_(shared) {}

  // Asks for the next turn. It takes a trip to L2: ask before it is needed.
  __device__ __forceinline__ void ask() {
    if (threadIdx.x == 0) drawn_ = static_cast<unsigned>(atomicAdd(counter_, 1));
  }
  // The turn last asked for.
  __device__ __forceinline__ unsigned answer() {
    if (threadIdx.x == 0) shared_ = drawn_;
    __syncthreads();
    return shared_;
  }

 private:
  int32_t* counter_;
  Shared& shared_;
  unsigned drawn_ = 0;
};

// How many units of a panel are done. All threads of the block call.
__device__ __forceinline__ void unit_done(int32_t* progress) {
  __syncthreads();
  if (threadIdx.x == 0) tile::ptx::add_release(progress, 1);
}

__device__ __forceinline__ void wait_for_units(const int32_t* progress, unsigned units) {
  if (threadIdx.x == 0) {
    while (static_cast<unsigned>(tile::ptx::load_acquire(progress)) < units) {
    }
  }
  __syncthreads();
}

}  // namespace jaxkern::quantize

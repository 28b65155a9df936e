// Quantisation of the transpose with a scale for each of its rows, the columns of x, from one read.
//
// A scale takes all of a column, and a panel of columns takes more than an SM has. So blocks share
// a panel, and keep their tiles in shared memory until the maxima of all of it are there:
//
//   turn n of a block   starts to load tile n + 1 | adds the maxima of tile n to those of its panel
//                       | waits for those of the panel of tile n - 1, and casts it
//
// Blocks draw tiles from a counter, down one panel after the other. A block that waits for a panel
// has added the maxima of all its tiles of that panel, of which it may have three. So it does not
// hang, in whatever order the GPU starts blocks, once a third as many are at work as a panel has
// tiles. That the scales of a tile are due one turn after its maxima hides the way to L2 and back.
#pragma once

#include "cuda/quantize/quantize_tile.cuh"
#include "cuda/quantize/turns.cuh"

namespace jaxkern::quantize {

template <class T>
struct ColumnsMemory {
  static constexpr int kSlots = 3;

  StagedPatch<T> slots[kSlots];
  TileMemory<T> tile;
  Draws::Shared drawn;
};

template <class T>  // shared memory has room for them
inline constexpr int kColumnsBlocksPerSm = 512 / Threads<T>::kThreads;

// kNormalises: by p.rstd_in. p.progress: the counter of tiles, then how many of each panel have
// added their maxima.
template <class Source, class T, class F, bool kAligned>
__global__ void __launch_bounds__(Threads<T>::kThreads, kColumnsBlocksPerSm<T>)
    quantize_columns_kernel(const QuantizeParams p) {
  constexpr int kSlots = ColumnsMemory<T>::kSlots;
  constexpr unsigned kNone = ~0u;
  static_assert(Threads<T>::kThreads >= 2 * kTile, "warps that add maxima, and others that wait");
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<ColumnsMemory<T>*>(shared);
  const bool aligned = kAligned || inputs_aligned<Source, T>(p);
  const auto row_tiles = static_cast<unsigned>(tile::ceil_div(p.rows, kTile));
  const unsigned tiles = row_tiles * static_cast<unsigned>(tile::ceil_div(p.cols, kTile));
  const QuantizedMatrix& to = p.outputs[0];
  int32_t* const progress = p.progress + 1;  // of panels

  auto place = [&](unsigned tile) { return Place<T>(p, tile % row_tiles, tile / row_tiles); };
  auto start = [&](unsigned tile, int slot) {
    if (tile < tiles) memory.slots[slot].template start<kAligned>(p, place(tile));
    tile::ptx::commit_copies_async();
  };
  // Of a tile that has come: makes it what is quantised, and finds its columns' maxima.
  auto find_maxima = [&](unsigned tile, int slot) {
    const Place<T> at = place(tile);
    Patch<T> x;
    memory.slots[slot].read(x);
    if constexpr (kNormalises<Source>) {
      normalise<T>(x, p, at, aligned);
      memory.slots[slot].write(x);
    }
    memory.tile.columns.write(x, at);
  };
  auto add_maxima = [&](unsigned tile) {
    if (threadIdx.x >= kTile) return;
    raise_column<T>(to.workspace, threadIdx.x, p, place(tile), memory.tile.columns);
  };
  auto release = [&](unsigned tile) {  // after all of the block has added its maxima
    if (threadIdx.x == 0) tile::ptx::add_release(progress + tile / row_tiles, 1);
  };
  auto same_panel = [&](unsigned a, unsigned b) { return a / row_tiles == b / row_tiles; };
  auto find_scales = [&](unsigned tile) {
    const int column = static_cast<int>(threadIdx.x) - kTile;
    if (column < 0 || column >= kTile) return;
    const Place<T> at = place(tile);
    while (tile::ptx::load_acquire(progress + at.tile_col) < static_cast<int>(row_tiles)) {
    }
    memory.tile.inverses[column] = scale_of_column<T, F>(column, at, p, to).inverse;
  };

  Draws draws(p.progress, memory.drawn);
  draws.ask();
  unsigned last = kNone, now = draws.answer();
  int slot = 0;  // of `now`
  bool released = false;
  start(now, slot);
  __syncthreads();
  draws.ask();
  unsigned next = draws.answer();
  for (;;) {
    const int next_slot = slot == kSlots - 1 ? 0 : slot + 1;
    const int last_slot = slot == 0 ? kSlots - 1 : slot - 1;
    start(next, next_slot);
    draws.ask();
    const bool add = now < tiles && !released;
    if (add) {
      tile::ptx::wait_copies_async<1>();
      find_maxima(now, slot);
    }
    __syncthreads();  // columns are written
    if (add) add_maxima(now);
    bool release_now = add, next_released = false;
    if (last != kNone && now < tiles && same_panel(now, last)) {
      // Seldom. The panel that the block waits for must have all that the block has of it.
      __syncthreads();  // maxima are added
      if (release_now) release(now);
      release_now = false;
      if (next < tiles && same_panel(next, last)) {
        tile::ptx::wait_copies_async<0>();
        find_maxima(next, next_slot);
        __syncthreads();
        add_maxima(next);
        __syncthreads();
        release(next);
        next_released = true;
      }
    }
    if (last != kNone) find_scales(last);
    const unsigned after = draws.answer();  // maxima are added, inverses are written
    if (last != kNone) {
      Patch<T> x;
      memory.slots[last_slot].read(x);
      cast_transposed<T, F, true>(x, place(last), 0.0f, memory.tile);
      __syncthreads();  // transposed is written
    }
    if (release_now) release(now);  // NOTE: right after the maxima it would wait for them
    if (last != kNone) store_transposed<T, kAligned>(place(last), p, to, memory.tile);
    if (now >= tiles) return;
    __syncthreads();  // transposed is read
    last = now;
    now = next;
    next = after;
    released = next_released;
    slot = next_slot;
  }
}

}  // namespace jaxkern::quantize

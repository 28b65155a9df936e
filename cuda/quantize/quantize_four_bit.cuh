// Quantisation to four bits, with a scale for each block of neighbours in a row.
//
// A warp has kFourBitSlots runs of eight elements for each lane, and loads them at once. The lanes
// that share a block agree on its extent; then each has the values of a run in a word.
#pragma once

#include "cuda/quantize/four_bit.cuh"
#include "cuda/quantize/quantize_rows.cuh"
#include "cuda/tile/ptx/async.cuh"

namespace jaxkern::quantize {

inline constexpr int kFourBitThreads = 256;
template <class T>
inline constexpr int kFourBitSlots = 8 / sizeof(T);

// Runs of a block of threads.
template <class T>
inline constexpr int kFourBitRuns = kFourBitThreads * kFourBitSlots<T>;

// As many as registers allow without spills.
template <class Format>
inline constexpr int kFourBitBlocksPerSm = Format::kStays          ? 4
                                           : Format::kHasZeroPoint ? 5
                                                                   : 6;

// Whether a block of threads loads the next part while it works on this one. NOTE: of float32 it
// would take 16 bytes of 32 at a time, and twice as long.
template <class T, class Format>
inline constexpr bool kLoadsAhead = Format::kStays && sizeof(Eight<T>) == kLoadBytes;

// What it has of the next part: each thread its own runs.
template <class T>
class NextPart {
 public:
  __device__ __forceinline__ void start(int s, const Bits<T>* from, bool exists) {
    tile::ptx::copy_async_16(&runs_[s][threadIdx.x], from, exists);
  }
  __device__ __forceinline__ void read(Eight<T> (&x)[kFourBitSlots<T>]) const {
    tile::ptx::wait_all_copies_async();
#pragma unroll
    for (int s = 0; s < kFourBitSlots<T>; ++s) x[s].words = runs_[s][threadIdx.x];
  }

 private:
  typename Eight<T>::Words runs_[kFourBitSlots<T>][kFourBitThreads];
};
struct NoNextPart {};

// p.blocks blocks share out a matrix: each has one part of it, or goes on where its format kStays.
// NVFP4 has read x before, for tensor_scale: backwards, L2 still has what was read last.
template <class T, class Format>
__global__ void __launch_bounds__(kFourBitThreads, kFourBitBlocksPerSm<Format>)
    quantize_four_bit_kernel(const QuantizeFourBitParams p) {
  constexpr bool kAhead = kLoadsAhead<T, Format>;
  __shared__ typename Format::Shared shared;
  __shared__ std::conditional_t<kAhead, NextPart<T>, NoNextPart> next;
  constexpr int kCount = kFourBitSlots<T>;
  const int64_t runs = p.size / kEight;
  const unsigned blocks = p.blocks, matrix = blockIdx.x / blocks;
  int part = static_cast<int>(tile::ceil_div<int64_t>(runs, kFourBitRuns<T>) - 1) -
             static_cast<int>(blockIdx.x % blocks);
  const int lane = threadIdx.x % tile::kWarpSize;
  const int lanes = (Format::kBlock > 0 ? Format::kBlock : p.block) / kEight;  // of a block
  // Where runs are counted from: those of this matrix, or all of them.
  const int64_t first_of_all = kAhead ? 0 : matrix * runs;
  const auto* const from = static_cast<const Bits<T>*>(p.x) + matrix * p.size;
  auto* const values = static_cast<uint32_t*>(p.values) + first_of_all;

  const int of_part = static_cast<int>(threadIdx.x - lane) * kCount + lane;
  const auto slot = [&](int s) { return of_part + s * tile::kWarpSize; };
  const auto run_of = [&](int part, int s) {  // of the matrix
    return int64_t{part} * kFourBitRuns<T> + slot(s);
  };
  // The runs of the next part, the first of all matrices. NOTE: to count in 32 bits is faster by 5%
  // where blocks load ahead, and elsewhere slower, of float16 by 8%.
  int64_t next_first = 0;
  int next_count = 0;
  Eight<T> x[kCount];
  const auto load = [&] {
    if constexpr (kAhead) {
      const int64_t first = int64_t{part} * kFourBitRuns<T>;
      next_first = matrix * runs + first;
      next_count = static_cast<int>(min(runs - first, int64_t{kFourBitRuns<T>}));
      const auto* const from_part = static_cast<const Bits<T>*>(p.x) + next_first * kEight;
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        next.start(s, from_part + slot(s) * kEight, slot(s) < next_count);
      }
    } else {
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
        const int64_t run = run_of(part, s);
        x[s].load(from + run * kEight, run < runs, true);
      }
    }
  };
  load();
  const Format format(p.tensor_scale != nullptr ? p.tensor_scale[matrix] : 0.0f, shared);

  while (true) {
    const int here = part, count = next_count;
    const int64_t first = next_first;
    if constexpr (Format::kStays) part -= static_cast<int>(blocks);
    if constexpr (kAhead) {
      next.read(x);
      if (part >= 0) load();
    }
    typename Format::Extent extents[kCount];
#pragma unroll
    for (int s = 0; s < kCount; ++s) extents[s].see(x[s]);
#pragma unroll
    for (int offset = tile::kWarpSize / 2; offset > 0; offset /= 2) {
      if (offset >= lanes) continue;
#pragma unroll
      for (int s = 0; s < kCount; ++s) extents[s].join_lane(offset);
    }
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const auto block = format.block(extents[s]);
      const uint32_t word = format.values(x[s], block);
      const int64_t run = kAhead ? first + slot(s) : run_of(here, s);
      const bool inside = kAhead ? slot(s) < count : run < runs;
      if (inside) values[run] = word;
      const int64_t at = (first_of_all + run) >> (__ffs(lanes) - 1);
      if (inside && (lane & (lanes - 1)) == 0) {
        static_cast<typename Format::Stored*>(p.scale)[at] = block.stored();
      }
      if constexpr (Format::kHasZeroPoint) {
        const uint32_t next = __shfl_xor_sync(0xffffffffu, block.zero_point(), lanes);
        if (inside && (lane & (2 * lanes - 1)) == 0) {
          static_cast<uint8_t*>(p.zero_point)[at / 2] = block.zero_point() | next << 4;
        }
      }
    }
    if (!Format::kStays || part < 0) return;
    if constexpr (!kAhead) load();
  }
}

// --- The largest magnitude -----------------------------------------------------------------------

template <class T>
inline constexpr int kNvfp4Lanes = 16 / kVec<T>;

// Of the finite blocks of 16 of each row, in p.outputs[0].scale. blockDim.x is at least
// kNvfp4Lanes.
template <class T>
__global__ void __maxnreg__(64) row_amax_kernel(const QuantizeParams p) {
  __shared__ uint32_t scratch[tile::kMaxWarps];
  const RowPart<Matrix, T, true> part{p, int64_t{blockIdx.x} * blockDim.y + threadIdx.y};
  uint32_t most = 0;
  const auto see = [&](const Load<T>(&x)[1]) {
    Amax<T> amax;
    amax.see(x[0]);
    const uint32_t bits = tile::warp_max(amax.bits(), kNvfp4Lanes<T>);
    most = max(most, bits < kInfinityBits ? bits : 0);
  };
  Load<T> x[kSlots<Matrix>][1];
  part.load_slots(x);
#pragma unroll
  for (int s = 0; s < kSlots<Matrix>; ++s) see(x[s]);
  part.beyond_slots([&](int64_t col) {
    Load<T> beyond[1];
    part.load(beyond, col);
    see(beyond);
  });
  most = tile::row_max(most, scratch);
  if (threadIdx.x == 0 && part.row < p.rows) {
    p.outputs[0].scale[part.row] = __uint_as_float(most);
  }
}

}  // namespace jaxkern::quantize

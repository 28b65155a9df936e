// The warps that multiply: how they divide rows and sequences, and the sums that they put together.
#pragma once

#include "cuda/decode/rows.h"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::decode {

inline constexpr int kWarps = 8;  // that multiply
inline constexpr int kConsumers = kWarps * tile::kWarpSize;

__device__ __forceinline__ void sync_consumers() { tile::ptx::named_barrier_sync(1, kConsumers); }

inline constexpr int kSequences = 8;  // the columns of an instruction
template <int kBatch>
inline constexpr int kSequenceTiles = tile::ceil_div(kBatch, kSequences);

// The warps that hand on what there is of a sequence, where each has its own, or one after the
// other in some rounds.
template <int kBatch>
struct Team {
  static constexpr int kSize = kBatch < kWarps ? kWarps / kBatch : 1;
  static constexpr int kLanes = kSize * tile::kWarpSize;
  static constexpr int kRounds = kBatch * kSize / kWarps;
  // The sequence and the lane of this thread.
  __device__ __forceinline__ static int sequence(int round) {
    return threadIdx.x / kLanes + round * (kWarps / kSize);
  }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }
  // Whether this is the first warp.
  __device__ __forceinline__ static bool leads() { return lane() < tile::kWarpSize; }
};

// How warps divide a block of kTiles tiles of rows: into slices, and more than 64 rows into two
// halves, so that there are fewer sums of all warps.
template <int kTiles>
struct Division {
  static constexpr int kHalves = kTiles > 4 ? 2 : 1;
  static constexpr int kEach = kWarps / kHalves;                // warps that have slices in turn
  static constexpr int kOwn = tile::ceil_div(kTiles, kHalves);  // tiles of a warp
  // Which of those with the same rows this warp is, and the first of the rows.
  __device__ __forceinline__ static int index() { return warp() % kEach; }
  __device__ __forceinline__ static int half() { return warp() / kEach; }
  __device__ __forceinline__ static int first_row() { return half() * kOwn * 16; }

 private:
  __device__ __forceinline__ static int warp() { return threadIdx.x / tile::kWarpSize; }
};

// Sums of a block of up to kMaxRows rows, which is of whole tiles here, by those who have the same
// rows.
template <int kBatch, int kMaxRows>
struct Sums {
  static constexpr int kRows = tile::ceil_div(kMaxRows, 16) * 16, kHalfRows = 64;
  // What a warp stores at once, eight rows of four pairs of sequences, is in 32 banks; but of 16
  // sequences and few rows, for which there is no room.
  static constexpr int kMore = kBatch == 1 ? 0 : 4;
  static constexpr int kStride = kRows + kMore;
  static constexpr int kHalfStride = kRows / 2 + (kBatch > kSequences ? kMore / 2 : kMore);
  static_assert(kHalfStride >= kHalfRows);
  float data[kWarps * kBatch * kHalfStride];

  // `large`: whether the block has more than kHalfRows.
  __device__ __forceinline__ static int place(int part, int n, int row, bool large) {
    return (part * kBatch + n) * (large ? kStride : kHalfStride) + row;
  }
  __device__ __forceinline__ float total(int n, int row, bool large) const {
    float sum[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const bool exists = !large || i < kWarps / 2;
      sum[i] = exists ? data[place(i, n, row, large)] : 0.0f;
    }
#pragma unroll
    for (int i = kWarps / 2; i > 0; i /= 2) {
#pragma unroll
      for (int part = 0; part < i; ++part) sum[part] += sum[part + i];
    }
    return sum[0];
  }
};

// A warp's sums of tiles of rows and of sequences.
template <int kBatch, int kTiles>
using Accumulators = float[kTiles][kSequenceTiles<kBatch>][4];

// Those of one sequence, of which the lanes of four, and two columns, have sums of blocks of
// weights.
template <int kParts, int kTiles>
__device__ __forceinline__ void add_blocks(Accumulators<1, kTiles> (&sum)[kParts]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
#pragma unroll
      for (int part = 1; part < kParts; ++part) sum[0][t][0][i] += sum[part][t][0][i];
#pragma unroll
      for (int part = 1; part < kParts; ++part) sum[part][t][0][i] = 0.0f;
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        sum[0][t][0][i] += __shfl_xor_sync(0xffffffffu, sum[0][t][0][i], lanes);
      }
    }
  }
}

// A warp's sums, which it may have in several parts; `more`: to what it has put there before.
template <int kTiles, int kParts, int kOwn, int kBatch, int kMaxRows>
__device__ __forceinline__ void put(const Accumulators<kBatch, kOwn> (&sum)[kParts],
                                    Sums<kBatch, kMaxRows>& sums, bool more) {
  using Division = decode::Division<kTiles>;
  static_assert(kOwn == Division::kOwn);
  const int lane = threadIdx.x % tile::kWarpSize;
  const auto each = [&](const auto& use) {  // use(place, sum)
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
      const int first = Division::first_row() + 16 * t;
      if (Division::kHalves * kOwn > kTiles && first >= 16 * kTiles) break;
#pragma unroll
      for (int s = 0; s < kSequenceTiles<kBatch>; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = first + 8 * (i / 2) + lane / 4, n = s * kSequences + lane % 4 * 2 + i % 2;
          float total = sum[0][t][s][i];
#pragma unroll
          for (int part = 1; part < kParts; ++part) total += sum[part][t][s][i];
          if (n < kBatch) use(sums.data[sums.place(Division::index(), n, row, kTiles > 4)], total);
        }
      }
    }
  };
  if (!more) {
    each([](float& place, float total) { place = total; });
  } else {
    each([](float& place, float total) { place += total; });
  }
}

}  // namespace jaxkern::decode

// The product of a block of rows with the vectors of all sequences.
//
// Rows are the 16 of mma.m16n8k16, sequences its 8 columns. All warps work on the same rows: slices
// of 32 columns go round among them, and their sums are added up at the end of the block. Lane c of
// four takes columns 8 c to 8 c + 7 of a slice, of both operands, for the k of two instructions:
// which of the columns is which k does not matter to a sum.
#pragma once

#include "cuda/decode/stream.cuh"
#include "cuda/tile/ptx/matrix.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::decode {

inline constexpr int kWarps = 8;  // that multiply
inline constexpr int kConsumers = kWarps * tile::kWarpSize;

__device__ __forceinline__ void sync_consumers() { tile::ptx::named_barrier_sync(1, kConsumers); }

// Vectors of bfloat16, [slices][kBatch][32].
template <int kBatch>
struct Vectors {
  using bf16 = tile::bf16;
  bf16* data;

  __device__ __forceinline__ bf16& at(int n, int k) const {
    return kBatch == 1 ? data[k] : data[(k / kSlice * kBatch + n) * kSlice + k % kSlice];
  }
  // What the lane needs of a slice: column g of B, sequence g, if there is one.
  __device__ __forceinline__ uint4 operand(int slice) const {
    const int lane = threadIdx.x % tile::kWarpSize;
    const int n = kBatch == 1 ? 0 : lane / 4 % kBatch;
    return *reinterpret_cast<const uint4*>(data + (slice * kBatch + n) * kSlice + lane % 4 * 8);
  }
};

// The warps' sums of a block of rows: [kWarps][kBatch][kMaxRows].
template <int kBatch>
struct Sums {
  float data[kWarps][kBatch][kMaxRows];

  __device__ __forceinline__ float total(int n, int row) const {
    float sum = data[0][n][row];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += data[warp][n][row];
    return sum;
  }
};

// A warp's sums, which it may have in several parts; `more`: to what it has put there before.
template <int kParts, int kTiles, int kBatch>
__device__ __forceinline__ void put(const float (&sum)[kParts][kTiles][4], Sums<kBatch>& sums,
                                    bool more) {
  const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * t + 8 * (i / 2) + lane / 4, n = lane % 4 * 2 + i % 2;
      float total = sum[0][t][i];
#pragma unroll
      for (int part = 1; part < kParts; ++part) total += sum[part][t][i];
      if (n < kBatch) sums.data[warp][n][row] = (more ? sums.data[warp][n][row] : 0.0f) + total;
    }
  }
}

template <int kTiles, int kBatch, int kStages>
__device__ __forceinline__ void multiply_tiles(Stream<kStages>& stream, tile::Slot<kStages>& slot,
                                               const Vectors<kBatch>& x, int rows, int slices,
                                               Sums<kBatch>& sums, bool more) {
  const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
  // Instructions that wait for none of each other. A block of few rows has few: after a dependency
  // it lies in the ring already, and its products are what others wait for.
  constexpr int kAtOnce = kTiles <= 2 ? 2 : 1;  // slices
  float sum[kAtOnce][kTiles][4] = {};
  const int slice_bytes = rows * kSliceBytes, at_once = slices_of_chunk(rows);
  bool ready = slot.is_full(stream.ring);
  for (int first = 0; first < slices; first += at_once, slot.advance()) {
    if (!ready) slot.wait_full(stream.ring);
    const char* chunk = stream.chunks[slot.stage()] + 16 * lane;
    const int count = min(at_once, slices - first);
    const auto add = [&]<int kSlices>(int i) {
      uint4 b[kSlices], low[kSlices][kTiles], high[kSlices][kTiles];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        b[s] = x.operand(first + i + s * kWarps);
        const char* slice = chunk + (i + s * kWarps) * slice_bytes;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          low[s][t] = *reinterpret_cast<const uint4*>(slice + 16 * t * kSliceBytes);
          high[s][t] = *reinterpret_cast<const uint4*>(slice + (16 * t + 8) * kSliceBytes);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          tile::ptx::mma_m16n8k16(sum[s][t], low[s][t].x, high[s][t].x, low[s][t].y, high[s][t].y,
                                  b[s].x, b[s].y);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          tile::ptx::mma_m16n8k16(sum[s][t], low[s][t].z, high[s][t].z, low[s][t].w, high[s][t].w,
                                  b[s].z, b[s].w);
        }
      }
    };
    int i = (warp - first) & (kWarps - 1);
    for (; i + (kAtOnce - 1) * kWarps < count; i += kAtOnce * kWarps) {
      add.template operator()<kAtOnce>(i);
    }
    if (kAtOnce > 1 && i < count) add.template operator()<1>(i);
    ready = slot.next().is_full(stream.ring);
    stream.ring.empty[slot.stage()].arrive_warp();
  }
  put(sum, sums, more);
}

// Weights of a block of at most 16 rows, taken from the ring before the vectors are there:
// registers hold them while others come in their place.
struct HeldWeights {
  static constexpr int kSlices = 8;  // of a warp
  uint4 low[kSlices], high[kSlices];

  static __device__ __forceinline__ bool fit(int rows, int slices) {
    return rows <= 16 && slices <= kSlices * kWarps;
  }

  template <int kStages>
  __device__ __forceinline__ void take(Stream<kStages>& stream, tile::Slot<kStages>& slot, int rows,
                                       int slices) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    const int slice_bytes = rows * kSliceBytes, at_once = slices_of_chunk(rows);
    int first = 0;  // slice of the chunk
    const auto leave = [&] {
      stream.ring.empty[slot.stage()].arrive_warp();
      slot.advance();
      first += at_once;
    };
    if (slices > 0) slot.wait_full(stream.ring);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = warp + i * kWarps;
      low[i] = high[i] = {};  // or the compiler keeps what these were in the last layer
      if (slice >= slices) continue;
      while (slice >= first + at_once) {
        leave();
        slot.wait_full(stream.ring);
      }
      const char* from = stream.chunks[slot.stage()] + (slice - first) * slice_bytes + 16 * lane;
      low[i] = *reinterpret_cast<const uint4*>(from);
      high[i] = *reinterpret_cast<const uint4*>(from + 8 * kSliceBytes);
    }
    while (first < slices) {
      slot.wait_full(stream.ring);
      leave();
    }
  }

  template <int kBatch>
  __device__ __forceinline__ void multiply(const Vectors<kBatch>& x, int slices,
                                           Sums<kBatch>& sums) const {
    const int warp = threadIdx.x / tile::kWarpSize;
    float sum[2][1][4] = {};
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = warp + i * kWarps;
      if (slice >= slices) break;
      const uint4 b = x.operand(slice);
      tile::ptx::mma_m16n8k16(sum[0][0], low[i].x, high[i].x, low[i].y, high[i].y, b.x, b.y);
      tile::ptx::mma_m16n8k16(sum[1][0], low[i].z, high[i].z, low[i].w, high[i].w, b.z, b.w);
    }
    put(sum, sums, false);
  }
};

// Into sums, once the consumers have synchronised; `more`: to what is there.
template <int kBatch, int kStages>
__device__ __forceinline__ void multiply(Stream<kStages>& stream, tile::Slot<kStages>& slot,
                                         const Vectors<kBatch>& x, int rows, int slices,
                                         Sums<kBatch>& sums, bool more) {
  const auto tiles = [&]<int kTiles>() {
    multiply_tiles<kTiles, kBatch>(stream, slot, x, rows, slices, sums, more);
  };
  switch (tile::ceil_div(rows, 16)) {
    case 0:
      break;
    case 1:
      tiles.template operator()<1>();
      break;
    case 2:
      tiles.template operator()<2>();
      break;
    case 3:
      tiles.template operator()<3>();
      break;
    case 4:
      tiles.template operator()<4>();
      break;
    case 5:
      tiles.template operator()<5>();
      break;
    case 6:
      tiles.template operator()<6>();
      break;
    case 7:
      tiles.template operator()<7>();
      break;
    default:
      tiles.template operator()<8>();
  }
}

}  // namespace jaxkern::decode

// Products of slices of a warp with vectors that lie in shared memory.
#pragma once

#include "cuda/decode/exchange.cuh"
#include "cuda/decode/warps.cuh"
#include "cuda/decode/weights.cuh"
#include "cuda/tile/ptx/matrix.cuh"

namespace jaxkern::decode {

// Where value k of sequence n is among vectors of bfloat16, [slices][batch][32], in memory that is
// shared as in what blocks send each other.
__device__ __forceinline__ int vector_place(int batch, int n, int k) {
  return batch == 1 ? k : (k / kSlice * batch + n) * kSlice + k % kSlice;
}

// Vectors of up to kBatch sequences.
template <int kBatch>
struct Vectors {
  Word* words;
  int batch;

  // Values 8 index to 8 index + 7 of a sequence.
  __device__ __forceinline__ Word& word(int n, int index) const {
    return words[vector_place(kBatch == 1 ? 1 : batch, n, index * Word::kValues) / Word::kValues];
  }
  // What the lane needs of a slice: column g of B, sequence g of a tile's, if there is one.
  __device__ __forceinline__ uint4 operand(int slice, int tile) const {
    constexpr int kSliceWords = kSlice / Word::kValues;
    const int lane = threadIdx.x % tile::kWarpSize;
    const int n = kBatch == 1 ? 0 : min(tile * kSequences + lane / 4 % kBatch, batch - 1);
    const int row = kBatch == 1 ? slice : slice * batch + n;
    return reinterpret_cast<const uint4*>(words)[row * kSliceWords + lane % 4];
  }
};

// How a block's weights are read and multiplied.
template <class Weight, int kBatch>
struct Reading {
  static constexpr bool kScales = Weights<Weight>::kScaleBytes > 0;
  // Whether the columns of B are blocks of weights, see multiply_blocks().
  static constexpr bool kBlocks = kScales && kBatch == 1;
  const ScaleCode& code;
  int to_scales;   // from a lane's weights in a slice to the scales of their first row
  int factors[4];  // of kBlocks: what of 32 columns each the lane has in its column of B, or
                   // nothing

  __device__ __forceinline__ Reading(const ScaleCode& code, int rows, int first_row) : code(code) {
    if constexpr (kScales) {
      const int lane = threadIdx.x % tile::kWarpSize, g = lane / 4, c = lane % 4;
      to_scales = (rows - first_row) * kSliceBytes - 16 * lane +
                  (first_row + g) * Weights<Weight>::kScaleBytes + (kBlocks ? 2 * c : 0);
      if constexpr (kBlocks) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          factors[part] = g == 2 * part + c / 2;
          tile::ptx::work_out_here(factors[part]);  // so that a product remains one
        }
      }
    }
  }
};

// sum[s] += kTiles tiles of the s-th of kSlices slices of the warp, which are kStep apart from
// `first` on, whose weights lie at from[s] for the lane. When registers have those it calls
// taken().
template <class Weight, int kStep, int kTiles, int kSlices, int kAll, int kBatch, class Taken>
__device__ __forceinline__ void multiply_slices(const Vectors<kBatch>& x, int first,
                                                const char* const (&from)[kSlices],
                                                Accumulators<kBatch, kTiles> (&sum)[kAll],
                                                const Taken& taken) {
  constexpr int kParts = Weights<Weight>::kParts, kColumnTiles = kSequenceTiles<kBatch>;
  uint4 b[kSlices][kParts][kColumnTiles], low[kSlices][kTiles], high[kSlices][kTiles];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        b[s][part][n] = x.operand((first + s * kStep) * kParts + part, n);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      low[s][t] = *reinterpret_cast<const uint4*>(from[s] + 16 * t * kSliceBytes);
      high[s][t] = *reinterpret_cast<const uint4*>(from[s] + (16 * t + 8) * kSliceBytes);
    }
  }
  taken();
  uint4 l[kSlices][kTiles], h[kSlices][kTiles];
  const auto each = [&](const auto& use) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) use(s, t);
    }
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    each([&](int s, int t) {
      l[s][t] = Weights<Weight>::unpack(low[s][t], part);
      h[s][t] = Weights<Weight>::unpack(high[s][t], part);
      const uint4 &a = l[s][t], &c = h[s][t];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint4& v = b[s][part][n];
        tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(sum[s][t][n], a.x, c.x, a.y, c.y,
                                                               v.x, v.y);
      }
    });
    each([&](int s, int t) {
      const uint4 &a = l[s][t], &c = h[s][t];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint4& v = b[s][part][n];
        tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(sum[s][t][n], a.z, c.z, a.w, c.w,
                                                               v.z, v.w);
      }
    });
  }
}

// The same of weights of four bits, which are multiplied with their scales here.
template <class Weight, int kStep, int kTiles, int kSlices, int kAll, int kBatch, class Taken>
__device__ __forceinline__ void multiply_scaled(const Vectors<kBatch>& x,
                                                const Reading<Weight, kBatch>& reading, int first,
                                                const char* const (&from)[kSlices],
                                                Accumulators<kBatch, kTiles> (&sum)[kAll],
                                                const Taken& taken) {
  using W = Weights<Weight>;
  using Bf16 = tile::ElementType<tile::bf16>;
  constexpr int kColumnTiles = kSequenceTiles<kBatch>;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    uint4 low[kTiles], high[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      low[t] = *reinterpret_cast<const uint4*>(from[s] + 16 * t * kSliceBytes);
      high[t] = *reinterpret_cast<const uint4*>(from[s] + (16 * t + 8) * kSliceBytes);
    }
#pragma unroll
    for (int part = 0; part < W::kParts; ++part) {
      uint4 b[kColumnTiles];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        b[n] = x.operand((first + s * kStep) * W::kParts + part, n);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const char* scales = from[s] + reading.to_scales + 16 * t * W::kScaleBytes;
        const auto* low_scales = reinterpret_cast<const uint16_t*>(scales);
        const auto* high_scales = reinterpret_cast<const uint16_t*>(scales + 8 * W::kScaleBytes);
        const uint4 a = W::unpack(low[t], part, low_scales[part], reading.code);
        const uint4 c = W::unpack(high[t], part, high_scales[part], reading.code);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          tile::ptx::mma_m16n8k16<Bf16>(sum[s][t][n], a.x, c.x, a.y, c.y, b[n].x, b[n].y);
          tile::ptx::mma_m16n8k16<Bf16>(sum[s][t][n], a.z, c.z, a.w, c.w, b[n].z, b[n].w);
        }
      }
    }
  }
  taken();
}

// The same of one sequence and of weights of four bits, which scales are not multiplied with here:
// column g of B has of the vector what belongs to block g of 16 columns, and zeros. So there is a
// sum for each row and block of a slice, and that is multiplied by its scale.
template <class Weight, int kStep, int kTiles, int kSlices, int kAll, class Taken>
__device__ __forceinline__ void multiply_blocks(const Vectors<1>& x,
                                                const Reading<Weight, 1>& reading, int first,
                                                const char* const (&from)[kSlices],
                                                Accumulators<1, kTiles> (&sum)[kAll],
                                                const Taken& taken) {
  using W = Weights<Weight>;
  using Bf16 = tile::ElementType<tile::bf16>;
  const int lane = threadIdx.x % tile::kWarpSize;
  const auto times = [](const uint4& v, uint32_t factor) {
    return make_uint4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
  };
  uint4 v[kSlices];
  float less[kSlices][4] = {};  // of all rows: what unpacked weights are too large
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    // The only one of a lane's parts that is in its column of B.
    v[s] = x.operand((first + s * kStep) * W::kParts + lane / 8, 0);
    if constexpr (W::kOffset != 0) {
      constexpr uint32_t kLess = W::kOffset | 0x80008000;
      const int* f = reading.factors;
      const uint4 own = times(v[s], f[0] + f[1] + f[2] + f[3]);
      tile::ptx::mma_m16n8k16<Bf16>(less[s], kLess, kLess, kLess, kLess, own.x, own.y);
      tile::ptx::mma_m16n8k16<Bf16>(less[s], kLess, kLess, kLess, kLess, own.z, own.w);
    }
  }
  uint4 low[kSlices][kTiles], high[kSlices][kTiles], l[kSlices][kTiles], h[kSlices][kTiles];
  uint32_t low_scales[kSlices][kTiles], high_scales[kSlices][kTiles];
  float blocks[kSlices][kTiles][4];
  const auto each = [&](const auto& use) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) use(s, t);
    }
  };
  each([&](int s, int t) {
    const char* values = from[s] + 16 * t * kSliceBytes;
    low[s][t] = *reinterpret_cast<const uint4*>(values);
    high[s][t] = *reinterpret_cast<const uint4*>(values + 8 * kSliceBytes);
    const char* scales = from[s] + reading.to_scales + 16 * t * W::kScaleBytes;
    low_scales[s][t] = *reinterpret_cast<const uint16_t*>(scales);
    high_scales[s][t] = *reinterpret_cast<const uint16_t*>(scales + 8 * W::kScaleBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) blocks[s][t][i] = less[s][i];
  });
  taken();
#pragma unroll
  for (int part = 0; part < W::kParts; ++part) {
    uint4 b[kSlices];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) b[s] = times(v[s], reading.factors[part]);
    each([&](int s, int t) {
      l[s][t] = W::unpack(low[s][t], part);
      h[s][t] = W::unpack(high[s][t], part);
      const uint4 &a = l[s][t], &c = h[s][t];
      tile::ptx::mma_m16n8k16<Bf16>(blocks[s][t], a.x, c.x, a.y, c.y, b[s].x, b[s].y);
    });
    each([&](int s, int t) {
      const uint4 &a = l[s][t], &c = h[s][t];
      tile::ptx::mma_m16n8k16<Bf16>(blocks[s][t], a.z, c.z, a.w, c.w, b[s].z, b[s].w);
    });
  }
  each([&](int s, int t) {
    float (&total)[4] = sum[s][t][0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[0] += blocks[s][t][half] * W::scale(low_scales[s][t], half, reading.code);
      total[2] += blocks[s][t][2 + half] * W::scale(high_scales[s][t], half, reading.code);
    }
  });
}

}  // namespace jaxkern::decode

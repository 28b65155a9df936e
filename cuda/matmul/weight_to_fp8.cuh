// A weight of four bits as e4m3, with a float32 scale for each row.
//
// A row has a factor, the power of two that brings its largest scale times the largest value, 6 or
// 15, to from 192 to 384 or from 120 to 240, and its weights are what e4m3 has nearest to their
// share of it. So the factor comes first: of MXFP4, whose scales are relative to the row's
// largest, it is known; else the scales of the row are read for it, and once more from L1.
//
// Up to four blocks share the 16 rows of a strip: their warps take tiles of 128 columns in turns,
// so that what they write at a time lies together. A lane has, for each 16 columns and of rows g
// and g + 8, the columns 2 c + 0, 1, 8 and 9: the four lanes of a row hand them on, until each has
// 16 bytes of it.
#pragma once

#include "cuda/matmul/four_bit.cuh"

namespace jaxkern {

inline constexpr int kWeightToFp8Threads = 256, kWeightToFp8Blocks = 4;  // of an SM

// Of values in float16, as four_bit.cuh has them: those of rows g and g + 8.
__device__ __forceinline__ void round_to_e4m3(const uint32_t (&from)[4], uint32_t (&a)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) a[i] = tile::ptx::e4m3_of_f16(from[i], from[i + 2]);
}

// e2m1 times float16 scales of rows g and g + 8, the halves of a word, and times kMore.
template <int kMore>
__device__ __forceinline__ void expand_scaled_e2m1(uint32_t word, uint32_t scales,
                                                   uint32_t (&a)[2]) {
  uint32_t values[4];
  expand_e2m1<tile::f16>(word, values);
  scale_rows<tile::f16>(values, scales);
#pragma unroll
  for (uint32_t& pair : values) {
    as_pair<tile::f16>(pair) = __hmul2(as_pair<tile::f16>(pair), both(tile::f16(kMore)));
  }
  round_to_e4m3(values, a);
}

// What a lane knows of the rows g and g + 8. raise() makes the larger of it and of a word of their
// scales, of kWords of a tile; load() takes the scales of a tile, and expand() makes four values of
// each row.
template <FourBitFormat kFormat>
struct FourBitToFp8;

template <>
struct FourBitToFp8<FourBitFormat::kNvfp4> {
  static constexpr bool kScans = true;
  uint4 codes;  // [step][row / 8]
  uint32_t base;

  // e5m3, [block % 2][row / 8]; a larger code is a larger scale.
  __device__ __forceinline__ static void raise(uint32_t (&most)[2], uint32_t word) {
    most[0] = max(most[0], max(word & 0xff, word >> 16 & 0xff));
    most[1] = max(most[1], max(word >> 8 & 0xff, word >> 24));
  }
  // The exponent of the largest scale, less the bias; that of NaN is one too many.
  __device__ __forceinline__ static uint32_t exponent(uint32_t most) { return min(most >> 3, 30u); }
  // Of a scale 2^(exponent - 10), 2^-5 of that.
  __device__ __forceinline__ static float factor(uint32_t most) {
    return __uint_as_float((exponent(most) + 127 - 15) << 23);
  }
  // The largest scale of a row becomes one in [2^15, 2^16), which e2m1, 2^-14 of it, is times.
  __device__ __forceinline__ void start(const uint32_t (&most)[2]) {
    base = 0x78007800 - (exponent(most[0]) << 10) - (exponent(most[1]) << 26);
  }
  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint4*>(scales)[threadIdx.x % 32 / 4];
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[2]) const {
    const uint32_t pair = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
    const uint32_t halves = __byte_perm(pair, 0, step % 2 == 0 ? 0x4140 : 0x4342);
    expand_scaled_e2m1<16>(word, halves * (1 << 7) + base, a);
  }
};

template <>
struct FourBitToFp8<FourBitFormat::kMxfp4> {
  static constexpr bool kScans = false;
  uint2 codes;  // [step / 2][row / 8]

  __device__ __forceinline__ static float factor(uint32_t) { return 0x1p-6f; }
  __device__ __forceinline__ void start(const uint32_t (&)[2]) {}
  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint2*>(scales)[threadIdx.x % 32 / 4];
  }
  // 2^-code becomes 2^15 of that; where float16 has no such exponent, zero.
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[2]) const {
    const uint32_t pair = step < 4 ? codes.x : codes.y;
    const uint32_t halves = __byte_perm(pair, 0, step % 4 < 2 ? 0x4140 : 0x4342);
    constexpr uint32_t kLargest = 0x001e001e;
    expand_scaled_e2m1<32>(word, (kLargest - __vminu2(halves, kLargest)) << 10, a);
  }
};

template <>
struct FourBitToFp8<FourBitFormat::kInt4> {
  static constexpr bool kScans = true;
  uint32_t scales[4], zeros[4];  // of 32 columns each
  float shares[2];

  // bfloat16, [row / 8].
  __device__ __forceinline__ static void raise(uint32_t (&most)[2], uint32_t word) {
    most[0] = max(most[0], word & 0x7fff);
    most[1] = max(most[1], word >> 16 & 0x7fff);
  }
  __device__ __forceinline__ static uint32_t exponent(uint32_t most) { return max(most >> 7, 16u); }
  __device__ __forceinline__ static float factor(uint32_t most) {
    return __uint_as_float((exponent(most) - 3) << 23);
  }
  // The largest scale of a row becomes one in [8, 16), and its integers at most 240.
  __device__ __forceinline__ void start(const uint32_t (&most)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) shares[i] = __uint_as_float((257 - exponent(most[i])) << 23);
  }
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* from) {
    const int blocks = w.blocks, g = threadIdx.x % 32 / 4;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from) + g * blocks;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i * blocks >> 2;
      scales[i] = words[block];
      zeros[i] = w.zero_points ? words[8 * blocks + block] : 0x43084308;  // 136
    }
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[2]) const {
    uint32_t values[4], zero = zeros[step / 2] + 0x21002100;  // 1032 and more, in float16
    const float2 pair = tile::unpack<tile::bf16>(scales[step / 2]);
    const __half2 rows = as_pair<tile::f16>(zero);
    expand_integers<tile::f16>(word, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto& two = as_pair<tile::f16>(values[i]);
      two = __hsub2(two, both<tile::f16>(i % 2 == 0 ? rows.x : rows.y));
    }
    scale_rows<tile::f16>(values, tile::pack<tile::f16>(pair.x * shares[0], pair.y * shares[1]));
    round_to_e4m3(values, a);
  }
};

// Of the four lanes of a row, lane c gets in x[i] what lane i has in x[c].
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i | bit], bit);
      x[i] = upper ? other : x[i];
      x[i | bit] = upper ? x[i | bit] : other;
    }
  }
}

// The 16 columns of a step in order, from the columns 2 c + 0, 1, 8 and 9 of lanes c.
__device__ __forceinline__ uint4 in_order(const uint32_t (&x)[4]) {
  constexpr uint32_t kLower = 0x5410, kUpper = 0x7632;
  return {__byte_perm(x[0], x[1], kLower), __byte_perm(x[2], x[3], kLower),
          __byte_perm(x[0], x[1], kUpper), __byte_perm(x[2], x[3], kUpper)};
}

// The largest scales of rows g and g + 8 of a strip, by some warps, as FourBitToFp8 has them: what
// a warp finds in every `warps`-th four tiles from its own number on.
template <FourBitFormat kFormat>
__device__ __forceinline__ void largest_scales(const FourBitWeight& w, const char* strip,
                                               int tile_bytes, int panels, int warp, int warps,
                                               uint32_t (&most)[2]) {
  // A lane has row lane % 8 of one of four tiles, and 4 * words bytes of it.
  const int lane = threadIdx.x % tile::kWarpSize;
  const int words = kFormat == FourBitFormat::kInt4 ? w.blocks : 4;
#pragma unroll 4
  for (int panel = 4 * warp + lane / 8; panel < panels; panel += 4 * warps) {
    const char* from = strip + static_cast<int64_t>(panel) * tile_bytes + kFourBitValueBytes;
    if constexpr (kFormat == FourBitFormat::kInt4) {
      for (int i = 0; i < words; ++i) {
        FourBitToFp8<kFormat>::raise(most,
                                     reinterpret_cast<const uint32_t*>(from)[lane % 8 * words + i]);
      }
    } else {
      const uint4 four = reinterpret_cast<const uint4*>(from)[lane % 8];
      for (const uint32_t word : {four.x, four.y, four.z, four.w}) {
        FourBitToFp8<kFormat>::raise(most, word);
      }
    }
  }
#pragma unroll
  for (uint32_t& x : most) {
    x = max(x, __shfl_xor_sync(0xffffffffu, x, 8));
    x = max(x, __shfl_xor_sync(0xffffffffu, x, 16));
    x = __shfl_sync(0xffffffffu, x, lane / 4);
  }
}

// A lane's parts of half a tile as e4m3, of rows g + 8 i and the columns 64 half + 16 c and on.
template <class Rows>
__device__ __forceinline__ void expand_half(const Rows& rows, const uint4& words, int half,
                                            uint4 (&out)[2]) {
  const uint32_t of_steps[4] = {words.x, words.y, words.z, words.w};
  uint32_t x[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[2];
    rows.expand(of_steps[i], 4 * half + i, a);
    x[0][i] = a[0];
    x[1][i] = a[1];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    transpose_quad(x[i]);
    out[i] = in_order(x[i]);
  }
}

template <FourBitFormat kFormat>
__global__ void __launch_bounds__(kWeightToFp8Threads, kWeightToFp8Blocks)
    weight_to_fp8_kernel(const __grid_constant__ WeightToFp8Params p, int parts, int tile_bytes) {
  using Rows = FourBitToFp8<kFormat>;
  constexpr int kWarps = kWeightToFp8Threads / tile::kWarpSize;
  __shared__ uint32_t largest[kFourBitRows];
  const int lane = threadIdx.x % tile::kWarpSize, warp = threadIdx.x / tile::kWarpSize;
  const int g = lane / 4, panels = p.panels;
  const int first = kWarps * static_cast<int>(blockIdx.x % parts) + warp, step = kWarps * parts;
  const int64_t strip = blockIdx.x / parts;
  const char* tiles = static_cast<const char*>(p.w.data) + strip * panels * tile_bytes;
  const auto tile_at = [&](int panel) { return tiles + static_cast<int64_t>(panel) * tile_bytes; };

  uint4 next[2];
  const auto load = [&](int panel) {
    if (panel >= panels) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      next[half] =
          __ldcs(reinterpret_cast<const uint4*>(tile_at(panel)) + lane + tile::kWarpSize * half);
    }
  };
  load(first);

  Rows rows;
  uint32_t most[2] = {};
  if constexpr (Rows::kScans) {
    if (threadIdx.x < kFourBitRows) largest[threadIdx.x] = 0;
    largest_scales<kFormat>(p.w, tiles, tile_bytes, panels, warp, kWarps, most);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane % 4 == 0) atomicMax(&largest[g + 8 * i], most[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) most[i] = largest[g + 8 * i];
  }
  rows.start(most);
  if (first == 0 && lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = strip * kFourBitRows + g + 8 * i;
      p.scale[row] = p.w.row_scale[row] * Rows::factor(most[i]);
    }
  }

  const int64_t columns = int64_t{panels} * kFourBitColumns;
  uint8_t* to = static_cast<uint8_t*>(p.values) + (strip * kFourBitRows + g) * columns;
  for (int panel = first; panel < panels; panel += step) {
    const uint4 values[2] = {next[0], next[1]};
    load(panel + step);
    rows.load(p.w, tile_at(panel) + kFourBitValueBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 out[2];
      expand_half(rows, values[half], half, out);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = int64_t{panel} * kFourBitColumns + 64 * half + 16 * (lane % 4);
        __stcs(reinterpret_cast<uint4*>(to + 8 * i * columns + at), out[i]);
      }
    }
  }
}

}  // namespace jaxkern

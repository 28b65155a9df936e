// Weights of four bits as the operand A of tensor cores.
//
// A word that packed_weight.py describes holds eight of them, which are a lane's of one step: 16
// rows by 16 columns for m16n8k16. expand() makes T of them, bfloat16 or float16, times the scale
// of their block. Values of e2m1 are moved to where T has sign, exponent and mantissa; that leaves
// 2^-126 or 2^-14 of them, and scales are so much larger that products are normal numbers; what
// remains, kSumScale, is for sums. Products of e2m1 and e4m3 are exact in both types, those of
// integers and their scales are rounded.
#pragma once

#include "cuda/matmul/four_bit.h"
#include "cuda/tile/four_bit.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern {

// --- Values --------------------------------------------------------------------------------------

using tile::as_pair, tile::both, tile::expand_e2m1, tile::expand_integers, tile::PairOf;

// a times the scales of rows g and g + 8, the halves of a word.
template <class T>
__device__ __forceinline__ void scale_rows(uint32_t (&a)[4], uint32_t scales) {
  const PairOf<T> rows = as_pair<T>(scales);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    as_pair<T>(a[i]) = __hmul2(as_pair<T>(a[i]), both<T>(i % 2 == 0 ? rows.x : rows.y));
  }
}

// The word of a step, of a lane's of a tile.
__device__ __forceinline__ uint32_t word_of(const uint4 (&values)[2], int step) {
  const uint4& four = values[step / 4];
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
  return words[step % 4];
}

// --- Formats -------------------------------------------------------------------------------------

// Scales that a lane has of a tile, those of rows g and g + 8, which lie together: row_bytes() of
// them. expand() makes the operand of a step.
template <FourBitFormat kFormat, class T>
struct FourBit;

template <class T>
struct FourBit<FourBitFormat::kNvfp4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = kBf16 ? 0x1p19f : 0x1p7f;
  uint4 codes;     // [step][row / 8]
  uint32_t eight;  // for expand_e2m1()

  __device__ __forceinline__ static int row_bytes(const FourBitWeight&) { return sizeof(codes); }
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* row) {
    codes = *reinterpret_cast<const uint4*>(row);
    eight = static_cast<uint32_t>(w.blocks);
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[4]) const {
    const uint32_t pair = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
    const uint32_t halves = __byte_perm(pair, 0, step % 2 == 0 ? 0x4140 : 0x4342);
    // (1 + m / 8) 2^(e - 10) becomes 2^107 or 2^7 times as much, and 255 in bfloat16 NaN.
    const uint32_t scales = kBf16 ? halves * (2 * eight) + 0x70007000 : halves * 128 + 0x30003000;
    expand_e2m1<T>(word, a, eight);
    scale_rows<T>(a, scales);
  }
};

template <class T>
struct FourBit<FourBitFormat::kMxfp4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = kBf16 ? 0x1p20f : 0x1p-1f;
  uint2 codes;     // [step / 2][row / 8]
  uint32_t eight;  // for expand_e2m1()

  __device__ __forceinline__ static int row_bytes(const FourBitWeight&) { return sizeof(codes); }
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* row) {
    codes = *reinterpret_cast<const uint2*>(row);
    eight = 2 * static_cast<uint32_t>(w.blocks);
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[4]) const {
    const uint32_t pair = step < 4 ? codes.x : codes.y;
    const uint32_t halves = __byte_perm(pair, 0, step % 4 < 2 ? 0x4140 : 0x4342);
    // 2^-code becomes 2^106 or 2^15 times as much; where T has no such exponent, zero.
    constexpr uint32_t kLargest = kBf16 ? 0x00e900e9 : 0x001e001e, kShift = kBf16 ? 7 : 10;
    const uint32_t scales = (kLargest - __vminu2(halves, kLargest)) << kShift;
    expand_e2m1<T>(word, a, eight);
    scale_rows<T>(a, scales);
  }
};

template <class T>
struct FourBit<FourBitFormat::kInt4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = 1.0f;
  uint32_t scales[4], zeros[4];  // of 32 columns each

  __device__ __forceinline__ static int row_bytes(const FourBitWeight& w) { return 4 * w.blocks; }
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* row) {
    const int blocks = w.blocks;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i * blocks >> 2;
      scales[i] = words[block];
      zeros[i] = w.zero_points ? words[8 * blocks + block] : 0x43084308;  // 136
      if constexpr (!kBf16) {
        const float2 pair = tile::unpack<tile::bf16>(scales[i]);
        scales[i] = tile::pack<tile::f16>(pair.x, pair.y);
        zeros[i] += 0x21002100;  // 1032 and more
      }
    }
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[4]) const {
    uint32_t zero = zeros[step / 2];
    const PairOf<T> rows = as_pair<T>(zero);
    expand_integers<T>(word, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      as_pair<T>(a[i]) = __hsub2(as_pair<T>(a[i]), both<T>(i % 2 == 0 ? rows.x : rows.y));
    }
    scale_rows<T>(a, scales[step / 2]);
  }
};

// What a lane has of a tile: expand() makes its part of the operand of a step.
template <FourBitFormat kFormat, class T>
struct FourBitTile {
  uint4 values[2];
  FourBit<kFormat, T> scales;

  // Where a lane finds its own, in bytes, of the tile that begins at `tile`.
  struct Place {
    int values, scales;

    __device__ __forceinline__ explicit Place(const FourBitWeight& w, int tile = 0) {
      const int lane = threadIdx.x % tile::kWarpSize;
      values = tile + lane * static_cast<int>(sizeof(uint4));
      scales = tile + kFourBitValueBytes + lane / 4 * FourBit<kFormat, T>::row_bytes(w);
      tile::ptx::work_out_here(values);
      tile::ptx::work_out_here(scales);
    }
  };
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* from,
                                       const Place& place) {
    const auto* own = reinterpret_cast<const uint4*>(from + place.values);
#pragma unroll
    for (int half = 0; half < 2; ++half) values[half] = own[tile::kWarpSize * half];
    scales.load(w, from + place.scales);
  }
  __device__ __forceinline__ void expand(int step, uint32_t* a) const {
    uint32_t own[4];
    scales.expand(word_of(values, step), step, own);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = own[i];
  }
};

// --- Scales of sums ------------------------------------------------------------------------------

// Where values count as they are, and it is sums over the 16 columns of a step that are multiplied:
// lane 4 g + c has those of rows g and g + 8 and of steps 2 c and 2 c + 1, whose scales these are.
// x has to be larger by kLargerBy, pairs of which are kLarger and kOne of 1; that leaves kSumScale.
// finish() makes of a sum what its values stand for; it needs the sum of x where kZeros.
template <FourBitFormat kFormat, class T>
struct FourBitSums;

// e2m1, by a scale with the bits of float32, or what follows from it.
template <class T>
struct E2m1Sums {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>, kZeros = false;
  static constexpr float kLargerBy = kBf16 ? 0x1p62f : 1.0f, kSumScale = kBf16 ? 0x1p64f : 0x1p14f;
  static constexpr uint32_t kOne = kBf16 ? 0x3f803f80 : 0x3c003c00;
  static constexpr uint32_t kLarger = kBf16 ? 0x5e805e80 : kOne;

  __device__ __forceinline__ static void expand(uint32_t word, uint32_t (&a)[4]) {
    expand_e2m1<T>(word, a);
  }
};

template <class T>
struct FourBitSums<FourBitFormat::kNvfp4, T> : E2m1Sums<T> {
  uint32_t codes;  // [step % 2][row / 8]

  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint32_t*>(scales)[threadIdx.x % tile::kWarpSize];
  }
  __device__ __forceinline__ float finish(float sum, float, int row, int step) const {
    // A byte of e5m3 is exponent and mantissa where they are after a shift by 4.
    const uint32_t byte = __byte_perm(codes, 0, 0x4044 | (2 * step + row) << 8);
    return sum * __uint_as_float((byte << 4) + (117 << 23));
  }
};

template <class T>
struct FourBitSums<FourBitFormat::kMxfp4, T> : E2m1Sums<T> {
  uint32_t codes;  // [row / 8]

  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint16_t*>(scales)[threadIdx.x % tile::kWarpSize];
  }
  __device__ __forceinline__ float finish(float sum, float, int row, int) const {
    return sum * __uint_as_float((127 - min(codes >> 8 * row & 0xff, 127u)) << 23);
  }
};

template <class T>
struct FourBitSums<FourBitFormat::kInt4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>, kZeros = true;
  static constexpr float kLargerBy = 1.0f, kSumScale = 1.0f;
  static constexpr uint32_t kOne = kBf16 ? 0x3f803f80 : 0x3c003c00, kLarger = kOne;
  uint32_t scales, zeros;  // bfloat16, of rows g and g + 8

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* from) {
    const int lane = threadIdx.x % tile::kWarpSize, block = lane % 4 * w.blocks >> 2;
    const auto* words = reinterpret_cast<const uint32_t*>(from) + lane / 4 * w.blocks + block;
    scales = words[0];
    zeros = w.zero_points ? words[8 * w.blocks] : 0x43084308;  // 136
  }
  __device__ __forceinline__ static void expand(uint32_t word, uint32_t (&a)[4]) {
    expand_integers<T>(word, a);
  }
  __device__ __forceinline__ float finish(float sum, float x, int row, int) const {
    constexpr float kMore = kBf16 ? 0.0f : 1024 - 128;
    return (sum - x * (of(zeros, row) + kMore)) * of(scales, row);
  }

 private:
  __device__ __forceinline__ static float of(uint32_t pair, int row) {
    return __uint_as_float(row == 0 ? pair << 16 : pair & 0xffff0000);
  }
};

}  // namespace jaxkern

// Weights as they lie in a lane's 16 bytes of a slice, and as operands for 32 columns each.
#pragma once

#include "cuda/decode/plan.h"
#include "cuda/tile/four_bit.cuh"
#include "cuda/tile/ptx/special.cuh"

namespace jaxkern::decode {

// What the scales of a row of a slice are to a lane; nothing but of weights of four bits.
struct NoScales {};

template <class T>
struct Weights;

template <>
struct Weights<tile::bf16> {
  static constexpr int kColumns = 32, kParts = 1;  // of a slice
  static constexpr int kScaleBytes = 0;            // of a row of it
  static constexpr bool kRowScales = false;
  static constexpr float kVectorScale = 1.0f, kSumScale = 1.0f;
  using Scales = NoScales;

  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int) { return raw; }
};

// The bits of an e4m3 number are those of a bfloat16 one, 2^-120 of its value, with zeros between
// sign and exponent. Vectors are larger by part of that, and sums by the rest. A word has four, of
// which two have their bits where bfloat16 has them; docs/decode.md has the places of the others.
// NOTE: the GPU would turn two into f16 with an instruction, but what vectors have may be too large
// for f16.
template <>
struct Weights<tile::e4m3> {
  static constexpr int kColumns = 64, kParts = 2, kScaleBytes = 0;
  static constexpr bool kRowScales = true;
  static constexpr float kVectorScale = 0x1p64f, kSumScale = 0x1p56f;
  using Scales = NoScales;

  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int part) {
    const uint32_t x = part == 0 ? raw.x : raw.z, y = part == 0 ? raw.y : raw.w;
    return {first(x), second(x), first(y), second(y)};
  }

 private:
  __device__ __forceinline__ static uint32_t first(uint32_t raw) { return raw & 0x87f087f0; }
  __device__ __forceinline__ static uint32_t second(uint32_t raw) {
    return (__funnelshift_r(raw, raw, 4) & 0x87808780) | (raw << 4 & 0x00700070);
  }
};

// What weights of four bits have in common. Of a slice a lane has a word of each 32 columns, and a
// row has 8 bytes of scales: 16 bits for each 32 columns.
struct FourBitWeights {
  static constexpr int kColumns = 128, kParts = 4, kScaleBytes = 8;
  static constexpr bool kRowScales = true;
  using Scales = uint2;

  __device__ __forceinline__ static uint32_t word(const uint4& raw, int part) {
    return part == 0 ? raw.x : part == 1 ? raw.y : part == 2 ? raw.z : raw.w;
  }
  // 16 bits twice.
  __device__ __forceinline__ static uint32_t twice(uint32_t bits) {
    return __byte_perm(bits, 0, 0x1010);
  }
  // The 16 bits of a part.
  __device__ __forceinline__ static uint32_t bits_of(const uint2& scales, int part) {
    const uint32_t two = part < 2 ? scales.x : scales.y;
    return part % 2 == 0 ? two : two >> 16;
  }
  __device__ __forceinline__ static uint4 times(uint32_t (&a)[4], uint32_t scale) {
#pragma unroll
    for (uint32_t& pair : a) {
      tile::as_pair<tile::bf16>(pair) =
          __hmul2(tile::as_pair<tile::bf16>(pair), tile::as_pair<tile::bf16>(scale));
    }
    return {a[0], a[1], a[2], a[3]};
  }
};

// 2^-126 of the values as bfloat16 has them, and 2^75 of their scales.
template <>
struct Weights<e2m1> : FourBitWeights {
  static constexpr float kVectorScale = 0x1p64f, kSumScale = 0x1p-13f;
  static constexpr uint32_t kOffset = 0;  // of what unpack() gives, bfloat16

  // Without their scales.
  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int part) {
    uint32_t a[4];
    tile::expand_e2m1<tile::bf16>(word(raw, part), a);
    return {a[0], a[1], a[2], a[3]};
  }
  // With them.
  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int part, uint32_t scales,
                                                 const ScaleCode& code) {
    const uint32_t bits = twice(scales);
    uint32_t a[4];
    tile::expand_e2m1<tile::bf16>(word(raw, part), a);
    return times(a,
                 (__funnelshift_l(bits, bits, code.turns[threadIdx.x / 2 % 2]) & code.pair_mask) |
                     code.pair_bits);
  }
  // Of 16 columns, the first or the second with the same 16 bits.
  __device__ __forceinline__ static float scale(uint32_t bits, int half, const ScaleCode& code) {
    return __uint_as_float((bits * code.factors[half] & code.mask) | code.bits);
  }
};

// Integers. Their scales are bfloat16 numbers.
template <>
struct Weights<s4> : FourBitWeights {
  static constexpr float kVectorScale = 1.0f, kSumScale = 1.0f;
  static constexpr uint32_t kOffset = 0x43084308;  // 136

  // Without their scales, and larger.
  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int part) {
    uint32_t a[4];
    tile::expand_integers<tile::bf16>(word(raw, part), a);
    return {a[0], a[1], a[2], a[3]};
  }
  __device__ __forceinline__ static uint4 unpack(const uint4& raw, int part, uint32_t scales,
                                                 const ScaleCode&) {
    uint32_t a[4], offset = kOffset;
    tile::expand_integers<tile::bf16>(word(raw, part), a);
#pragma unroll
    for (uint32_t& pair : a) {
      tile::as_pair<tile::bf16>(pair) =
          __hsub2(tile::as_pair<tile::bf16>(pair), tile::as_pair<tile::bf16>(offset));
    }
    return times(a, twice(scales));
  }
  __device__ __forceinline__ static float scale(uint32_t bits, int, const ScaleCode&) {
    return __uint_as_float(bits << 16);
  }
};

}  // namespace jaxkern::decode

// Weights of four bits as the operand A of products of e4m3.
//
// Columns go in panels of 128. In each a row has a factor, a power of two or, of integers with one
// scale there, that scale, and its weights are what e4m3 has nearest to their share of it. Sums of
// a panel count times the factor. So weights are exact where they have at most four significant
// bits: integers in groups of 128, those of MXFP4 down to 2^-9 of the panel's largest scale, and of
// NVFP4 all but some of +-1.5, 3 and 6.
//
// A word's eight become float16 first, where they are scaled (four_bit.cuh). Four of them, of a
// row, then fill a register. Of lane 4 g + c they are the columns 2 c + 0, 1, 8 and 9 of 16, which
// for the tensor core are 4 c + 0, 1, 2 and 3: the other operand has its columns in that order too.
#pragma once

#include "cuda/matmul/four_bit.cuh"
#include "cuda/tile/reg.cuh"

namespace jaxkern {

// Of values in float16, as four_bit.cuh has them: those of rows g and g + 8.
__device__ __forceinline__ void round_to_e4m3(const uint32_t (&from)[4], uint32_t* a) {
#pragma unroll
  for (int i = 0; i < 2; ++i) a[i] = tile::ptx::e4m3_of_f16(from[i], from[i + 2]);
}

// Scales that a lane has of a tile. expand() makes the registers of a step, of rows g and g + 8.
template <FourBitFormat kFormat>
struct FourBitFp8;

// What FourBitFp8 has of e2m1: float16 scales of rows g and g + 8, the halves of a word.
__device__ __forceinline__ void expand_scaled_e2m1(uint32_t word, uint32_t scales, uint32_t* a) {
  uint32_t values[4];
  expand_e2m1<tile::f16>(word, values);
  scale_rows<tile::f16>(values, scales);
  round_to_e4m3(values, a);
}

template <>
struct FourBitFp8<FourBitFormat::kNvfp4> {
  uint4 codes;  // [step][row / 8]
  uint32_t base;
  tile::RowVector factors;

  // The largest scale of a row becomes one in [2^15, 2^16), which e2m1, 2^-14 of it, is times.
  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint4*>(scales)[threadIdx.x % 32 / 4];
    constexpr uint32_t kLower = 0x00ff00ff;
    uint32_t low = __vmaxu2(__vmaxu2(codes.x & kLower, codes.y & kLower),
                            __vmaxu2(codes.z & kLower, codes.w & kLower));
    // Of halves with two codes the upper one decides.
    uint32_t high = __vmaxu2(__vmaxu2(codes.x, codes.y), __vmaxu2(codes.z, codes.w));
    // The code of NaN has an exponent too many.
    low = min(__vmaxu2(low, low >> 16) & 0x00f8, 0x00f0);
    high = min(__vmaxu2(high, high >> 16) & 0xf800, 0xf000);
    base = 0x78007800 - (low * (1 << 7) + high * (1 << 15));
    factors[0] = __uint_as_float(low * (1 << 20) + (116 << 23));
    factors[1] = __uint_as_float(high * (1 << 12) + (116 << 23));
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t* a) const {
    const uint32_t pair = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
    const uint32_t halves = __byte_perm(pair, 0, step % 2 == 0 ? 0x4140 : 0x4342);
    expand_scaled_e2m1(word, halves * (1 << 7) + base, a);
  }
};

template <>
struct FourBitFp8<FourBitFormat::kMxfp4> {
  uint2 codes;     // [step / 2][row / 8]
  uint32_t least;  // of the codes of a row: that of its largest scale
  tile::RowVector factors;

  // As above, but 2^-code becomes 2^15 of the panel's largest.
  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint2*>(scales)[threadIdx.x % 32 / 4];
    constexpr uint32_t kLower = 0x00ff00ff, kLargest = 126;
    uint32_t low = __vminu2(codes.x & kLower, codes.y & kLower);
    uint32_t high = __vminu2(codes.x, codes.y);
    low = __vminu2(low, low >> 16) & 0xff;
    high = __vminu2(high, high >> 16) >> 8 & 0xff;
    least = __byte_perm(low, high, 0x5410);
    factors[0] = __uint_as_float((kLargest - min(low, kLargest)) << 23);
    factors[1] = __uint_as_float((kLargest - min(high, kLargest)) << 23);
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t* a) const {
    const uint32_t pair = step < 4 ? codes.x : codes.y;
    const uint32_t halves = __byte_perm(pair, 0, step % 4 < 2 ? 0x4140 : 0x4342);
    constexpr uint32_t kLargest = 0x001e001e;
    expand_scaled_e2m1(word, (kLargest - __vminu2(halves - least, kLargest)) << 10, a);
  }
};

template <>
struct FourBitFp8<FourBitFormat::kInt4> {
  uint32_t scales[4], zeros[4];  // of 32 columns each
  bool scaled;                   // more than one scale
  tile::RowVector factors;

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* from) {
    const int blocks = w.blocks, g = threadIdx.x % 32 / 4;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from) + g * blocks;
    scaled = blocks > 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i * blocks >> 2;
      scales[i] = words[block];
      const uint32_t zero = w.zero_points ? words[8 * blocks + block] : 0x43084308;  // 136
      zeros[i] = zero + 0x21002100;  // 1032 and more, in float16
    }
    const float2 first = tile::unpack<tile::bf16>(scales[0]);
    factors[0] = first.x;
    factors[1] = first.y;
    if (scaled) share_out();
  }
  // The largest scale of a row becomes one in [8, 16), and its integers at most 240.
  __device__ __forceinline__ void share_out() {
    constexpr uint32_t kExponents = 0x7f807f80, kLeast = 0x08000800;
    uint32_t largest = kLeast;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, scales[i] & kExponents);
    float shares[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = i == 0 ? largest << 16 : largest & 0xffff0000;
      factors[i] = __uint_as_float(bits - (3 << 23));
      shares[i] = __uint_as_float((257u << 23) - bits);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = tile::unpack<tile::bf16>(scales[i]);
      scales[i] = tile::pack<tile::f16>(pair.x * shares[0], pair.y * shares[1]);
    }
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t* a) const {
    uint32_t values[4], zero = zeros[step / 2];
    const __half2 rows = as_pair<tile::f16>(zero);
    expand_integers<tile::f16>(word, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto& pair = as_pair<tile::f16>(values[i]);
      pair = __hsub2(pair, both<tile::f16>(i % 2 == 0 ? rows.x : rows.y));
    }
    if (scaled) scale_rows<tile::f16>(values, scales[step / 2]);
    round_to_e4m3(values, a);
  }
};

// What a warp has of a tile: its rows of an operand of 128 columns, and their factors.
template <FourBitFormat kFormat>
__device__ __forceinline__ tile::RowVector expand_fp8(const FourBitWeight& w, const char* tile,
                                                      tile::RegisterTile<tile::e4m3, 64, 128>& y) {
  const auto* from = reinterpret_cast<const uint4*>(tile) + threadIdx.x % tile::kWarpSize;
  FourBitFp8<kFormat> scales;
  scales.load(w, tile + kFourBitValueBytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 four = from[tile::kWarpSize * half];
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) scales.expand(words[i], 4 * half + i, y.data + 8 * half + 2 * i);
  }
  return scales.factors;
}

}  // namespace jaxkern

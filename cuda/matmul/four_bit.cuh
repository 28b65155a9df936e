// Weights of four bits as the operand A of tensor cores.
//
// A word that packed_weight.py describes holds eight of them, which are a lane's of one step: 16
// rows by 16 columns for m16n8k16. expand() makes T of them, bfloat16 or float16, times the scale
// of their block. Values of e2m1 are moved to where T has sign, exponent and mantissa; that leaves
// 2^-126 or 2^-14 of them, and scales are so much larger that products are normal numbers; what
// remains, kSumScale, is for sums. Products of e2m1 and e4m3 are exact in both types, those of
// integers and their scales are rounded.
#pragma once

#include <type_traits>

#include "cuda/matmul/four_bit.h"
#include "cuda/tile/ptx/matrix.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern {

// --- Values --------------------------------------------------------------------------------------

template <class T>
using PairOf = std::conditional_t<std::is_same_v<T, tile::bf16>, __nv_bfloat162, __half2>;

template <class T>
__device__ __forceinline__ PairOf<T>& as_pair(uint32_t& x) {
  return *reinterpret_cast<PairOf<T>*>(&x);
}
template <class T>
__device__ __forceinline__ PairOf<T> both(T x) {
  return {x, x};
}

// e2m1, 2^-126 of its value in bfloat16, 2^-14 in float16.
template <class T>
__device__ __forceinline__ void expand_e2m1(uint32_t word, uint32_t (&a)[4]);

template <>
__device__ __forceinline__ void expand_e2m1<tile::bf16>(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kAll = 0x81c081c0;
  a[0] = word & kAll;
  a[1] = word << 3 & kAll;
  a[2] = word << 6 & kAll;
  // Of the bits 6, 5, 3 and 2 a product makes copies, none over another: c stays, a and b move by
  // 5, the sign by 10.
  a[3] = (word >> 8 & 0x006c006c) * (1 + (1 << 5) + (1 << 10)) & kAll;
}
template <>
__device__ __forceinline__ void expand_e2m1<tile::f16>(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kSign = 0x80008000, kRest = 0x0e000e00;
  a[0] = (word & kSign) | (word << 3 & kRest);
  a[1] = (word << 3 & kSign) | (word << 6 & kRest);
  a[2] = (word << 6 & kSign) | (word << 9 & kRest);
  a[3] = (word << 2 & kSign) | (word & 0x0c000c00) | (word >> 5 & 0x02000200);
}

// Integers and 8, 128 or 1024 larger.
template <class T>
__device__ __forceinline__ void expand_integers(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kLarger = std::is_same_v<T, tile::bf16> ? 0x43004300 : 0x64006400;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = tile::ptx::select_or(word >> 4 * i, 0x000f000f, kLarger);
}

// a times the scales of rows g and g + 8, the halves of a word.
template <class T>
__device__ __forceinline__ void scale_rows(uint32_t (&a)[4], uint32_t scales) {
  const PairOf<T> rows = as_pair<T>(scales);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    as_pair<T>(a[i]) = __hmul2(as_pair<T>(a[i]), both<T>(i % 2 == 0 ? rows.x : rows.y));
  }
}

// --- Formats -------------------------------------------------------------------------------------

// Scales that a lane has of a tile. expand() makes the operand of a step.
template <FourBitFormat kFormat, class T>
struct FourBit;

template <class T>
struct FourBit<FourBitFormat::kNvfp4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = kBf16 ? 0x1p19f : 0x1p7f;
  uint4 codes;  // [step][row / 8]
  // NOTE: a factor that the compiler does not know: a shift would be for the pipe of logic, which
  // has most to do.
  uint32_t sixteen;

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* scales) {
    codes = reinterpret_cast<const uint4*>(scales)[threadIdx.x % 32 / 4];
    sixteen = 2 * static_cast<uint32_t>(w.blocks);
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[4]) const {
    const uint32_t pair = step < 2 ? codes.x : step < 4 ? codes.y : step < 6 ? codes.z : codes.w;
    const uint32_t halves = __byte_perm(pair, 0, step % 2 == 0 ? 0x4140 : 0x4342);
    // (1 + m / 8) 2^(e - 10) becomes 2^107 or 2^7 times as much, and 255 in bfloat16 NaN.
    const uint32_t scales = kBf16 ? halves * sixteen + 0x70007000 : halves * 128 + 0x30003000;
    expand_e2m1<T>(word, a);
    scale_rows<T>(a, scales);
  }
};

template <class T>
struct FourBit<FourBitFormat::kMxfp4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = kBf16 ? 0x1p20f : 0x1p-1f;
  uint2 codes;  // [step / 2][row / 8]

  __device__ __forceinline__ void load(const FourBitWeight&, const char* scales) {
    codes = reinterpret_cast<const uint2*>(scales)[threadIdx.x % 32 / 4];
  }
  __device__ __forceinline__ void expand(uint32_t word, int step, uint32_t (&a)[4]) const {
    const uint32_t pair = step < 4 ? codes.x : codes.y;
    const uint32_t halves = __byte_perm(pair, 0, step % 4 < 2 ? 0x4140 : 0x4342);
    // 2^-code becomes 2^106 or 2^15 times as much; where T has no such exponent, zero.
    constexpr uint32_t kLargest = kBf16 ? 0x00e900e9 : 0x001e001e, kShift = kBf16 ? 7 : 10;
    const uint32_t scales = (kLargest - __vminu2(halves, kLargest)) << kShift;
    expand_e2m1<T>(word, a);
    scale_rows<T>(a, scales);
  }
};

template <class T>
struct FourBit<FourBitFormat::kInt4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  static constexpr float kSumScale = 1.0f;
  uint32_t scales[4], zeros[4];  // of 32 columns each

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* from) {
    const int blocks = w.blocks, g = threadIdx.x % 32 / 4;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from) + g * blocks;
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

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* tile) {
    const auto* from = reinterpret_cast<const uint4*>(tile) + threadIdx.x % tile::kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) values[half] = from[tile::kWarpSize * half];
    scales.load(w, tile + kFourBitValueBytes);
  }
  __device__ __forceinline__ void expand(int step, uint32_t* a) const {
    const uint4& four = values[step / 4];
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    uint32_t own[4];
    scales.expand(words[step % 4], step, own);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = own[i];
  }
};

// --- Transposed ----------------------------------------------------------------------------------

// Where in a tile a lane finds what it has of a step for its transpose, in bytes: the word, and
// scales of rows 2 c and 2 c + 1, each beside those of the rows 8 further on.
template <FourBitFormat kFormat>
struct FourBitPlace {
  int word, even, odd;

  __device__ __forceinline__ FourBitPlace(const FourBitWeight& w, int step) {
    constexpr int kPairBytes = kFormat == FourBitFormat::kInt4 ? 4 : 2;
    const int lane = threadIdx.x % tile::kWarpSize;
    word = ((step / 4 * tile::kWarpSize + lane) * 4 + step % 4) * static_cast<int>(sizeof(word));
    even = kFourBitValueBytes + (lane % 4 * 2 * w.blocks + (step * w.blocks >> 3)) * kPairBytes;
    odd = even + w.blocks * kPairBytes;
    tile::ptx::work_out_here(word);
    tile::ptx::work_out_here(even);
    tile::ptx::work_out_here(odd);
  }
};

template <class T>
__device__ __forceinline__ uint32_t load_at(const char* from, int place) {
  return *reinterpret_cast<const T*>(from + place);
}

// Scales of a step for its transpose, whose operand has 16 columns of a tile as rows. A lane has
// pairs of tile rows, from 2 c and from 2 c + 8 on: scales() are those of a pair. NaN belongs to
// blocks here, not to rows. `factors` are those of the rows of a strip of kMxfp4.
template <FourBitFormat kFormat, class T>
struct FourBitColumns;

// A byte of each half, the lower or the upper one, as a half.
__device__ __forceinline__ uint32_t code_pair(const uint32_t (&codes)[2], int pair) {
  return __byte_perm(codes[0], codes[1], pair == 0 ? 0x2420 : 0x2521);
}

template <class T>
struct FourBitColumns<FourBitFormat::kNvfp4, T> {
  uint32_t codes[2];  // [row % 2], of rows 2 c and 2 c + 8

  template <class Place>
  __device__ __forceinline__ void load(const FourBitWeight&, const char* tile, const Place& place,
                                       const T*) {
    codes[0] = load_at<uint16_t>(tile, place.even);
    codes[1] = load_at<uint16_t>(tile, place.odd);
  }
  __device__ __forceinline__ uint32_t scales(int pair) const {
    const uint32_t halves = code_pair(codes, pair);
    if constexpr (std::is_same_v<T, tile::bf16>) return halves * 16 + 0x70007000;
    uint32_t smaller = halves * 128;  // 2^-5 times the scale, and 255 is NaN
    as_pair<T>(smaller) = __hmul2(as_pair<T>(smaller), both<T>(static_cast<T>(0x1p12f)));
    return smaller;
  }
  __device__ __forceinline__ void expand(uint32_t word, uint32_t (&a)[4]) const {
    expand_e2m1<T>(word, a);
  }
};

template <class T>
struct FourBitColumns<FourBitFormat::kMxfp4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  uint32_t codes[2], factors[2];

  template <class Place>
  __device__ __forceinline__ void load(const FourBitWeight&, const char* tile, const Place& place,
                                       const T* of_rows) {
    codes[0] = load_at<uint16_t>(tile, place.even);
    codes[1] = load_at<uint16_t>(tile, place.odd);
    const auto* pairs = reinterpret_cast<const uint32_t*>(of_rows) + threadIdx.x % 4;
    factors[0] = pairs[0];
    factors[1] = pairs[4];
  }
  __device__ __forceinline__ uint32_t scales(int pair) const {
    constexpr uint32_t kLargest = kBf16 ? 0x00e900e9 : 0x001e001e, kShift = kBf16 ? 7 : 10;
    const uint32_t halves = code_pair(codes, pair);
    uint32_t scales = (kLargest - __vminu2(halves, kLargest)) << kShift;
    // Infinite where the code is 255, which makes NaN, and finite elsewhere.
    uint32_t bad = kBf16 ? halves * 128 : halves * 124 + 0x007c007c, factor = factors[pair];
    as_pair<T>(scales) = __hmul2(as_pair<T>(scales), as_pair<T>(factor));
    as_pair<T>(scales) =
        __hfma2(as_pair<T>(bad), both<T>(static_cast<T>(0.0f)), as_pair<T>(scales));
    return scales;
  }
  __device__ __forceinline__ void expand(uint32_t word, uint32_t (&a)[4]) const {
    expand_e2m1<T>(word, a);
  }
};

template <class T>
struct FourBitColumns<FourBitFormat::kInt4, T> {
  static constexpr bool kBf16 = std::is_same_v<T, tile::bf16>;
  uint32_t stored[2], zeros[2];  // [row % 2], of rows 2 c and 2 c + 8

  template <class Place>
  __device__ __forceinline__ void load(const FourBitWeight& w, const char* tile, const Place& place,
                                       const T*) {
    stored[0] = load_at<uint32_t>(tile, place.even);
    stored[1] = load_at<uint32_t>(tile, place.odd);
    const char* after = tile + 2 * kFourBitRows * w.blocks;
    zeros[0] = w.zero_points ? load_at<uint32_t>(after, place.even) : 0x43084308;  // 136
    zeros[1] = w.zero_points ? load_at<uint32_t>(after, place.odd) : 0x43084308;
  }
  __device__ __forceinline__ static uint32_t half_pair(const uint32_t (&words)[2], int pair) {
    return __byte_perm(words[0], words[1], pair == 0 ? 0x5410 : 0x7632);
  }
  __device__ __forceinline__ uint32_t scales(int pair) const {
    const uint32_t halves = half_pair(stored, pair);
    if constexpr (kBf16) return halves;
    const float2 x = tile::unpack<tile::bf16>(halves);
    return tile::pack<T>(x.x, x.y);
  }
  __device__ __forceinline__ void expand(uint32_t word, uint32_t (&a)[4]) const {
    expand_integers<T>(word, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t zero = half_pair(zeros, i % 2) + (kBf16 ? 0 : 0x21002100);  // 1032 and more
      as_pair<T>(a[i]) = __hsub2(as_pair<T>(a[i]), as_pair<T>(zero));
    }
  }
};

// What a lane has of a step for its transpose: expand() makes its part of the operand.
template <FourBitFormat kFormat, class T>
struct FourBitTransposed {
  uint32_t word;
  FourBitColumns<kFormat, T> columns;

  __device__ __forceinline__ void load(const FourBitWeight& w, const char* tile,
                                       const FourBitPlace<kFormat>& place, const T* factors) {
    word = load_at<uint32_t>(tile, place.word);
    columns.load(w, tile, place, factors);
  }
  // The halves of a word belong to two columns and have the same rows, so that one transposition
  // of halves is that of all values.
  __device__ __forceinline__ void expand(uint32_t* a) const {
    uint32_t own[4];
    columns.expand(tile::ptx::movmatrix_transposed(word), own);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t scales = columns.scales(i % 2);
      as_pair<T>(own[i]) = __hmul2(as_pair<T>(own[i]), as_pair<T>(scales));
      a[i % 2 * 2 + i / 2] = own[i];  // values 1 and 2 change places
    }
  }
};

}  // namespace jaxkern

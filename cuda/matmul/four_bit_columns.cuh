// Weights of four bits as the operand A of tensor cores, transposed: columns of a tile are its
// rows, for sums over rows of the weight.
#pragma once

#include "cuda/matmul/four_bit.cuh"
#include "cuda/tile/ptx/matrix.cuh"

namespace jaxkern {

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

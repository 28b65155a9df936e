// What the kernels of quantisation share: runs of elements in 32-bit words, and scales.
//
// Elements stay in the words that they were loaded in until they are cast: the largest magnitude of
// two 16-bit elements is one instruction, and it compares bits, among which NaN and infinity are
// above all finite numbers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/quantize/params.h"
#include "cuda/tile/types.cuh"

namespace jaxkern::quantize {

inline constexpr int kLoadBytes = 16;  // that a thread loads at once

template <class T>
inline constexpr int kVec = kLoadBytes / sizeof(T);  // elements of T in them
template <class T>
inline constexpr int kPerWord = 4 / sizeof(T);

// `kCount` neighbouring elements, moved at once where `aligned`, else one by one.
template <class Element, int kCount>
struct Run {
  static constexpr int kBytes = kCount * sizeof(Element);
  static constexpr int kElementsPerWord = 4 / sizeof(Element);

  struct alignas(std::min(kBytes, 16)) Words {
    uint32_t data[kBytes / 4];
  };
  Words words;

  // Whether runs at multiples of kCount are aligned in an array that is `pitch` elements wide. If
  // so, a run lies in a row or beside it, but never across its end.
  static __host__ __device__ __forceinline__ bool aligned(const void* data, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(data) % alignof(Words) == 0 && pitch % kCount == 0;
  }

  // The first `inside` of the elements exist; the others become 0, or are not stored.
  __device__ __forceinline__ void load(const Element* from, int inside, bool aligned) {
    words = {};
    if (aligned) {
      if (inside > 0) words = *reinterpret_cast<const Words*>(from);
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e >= inside) continue;
      words.data[e / kElementsPerWord] |= uint32_t{from[e]} << shift(e);
    }
  }
  __device__ __forceinline__ void store(Element* to, int inside, bool aligned) const {
    if (aligned) {
      if (inside > 0) *reinterpret_cast<Words*>(to) = words;
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e < inside) to[e] = static_cast<Element>(words.data[e / kElementsPerWord] >> shift(e));
    }
  }

 private:
  static __device__ constexpr int shift(int e) {
    return e % kElementsPerWord * 8 * sizeof(Element);
  }
};

// The bits of T as an integer.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// What a thread loads at once.
template <class T>
using Load = Run<Bits<T>, kVec<T>>;

// Threads that load the 128 columns of a block of a row.
template <class T>
inline constexpr int kGroupLanes = kScaleBlock / kVec<T>;

// padded_scale_row() on the device.
__device__ __forceinline__ int64_t scale_pitch(int64_t size) { return tile::ceil_div(size, 4) * 4; }

// How many of the elements of a run, the first of which is number `first` of `size`, exist; 0 or
// less if none.
__device__ __forceinline__ int inside(int64_t first, int64_t size) {
  constexpr int64_t kMost = kScaleBlock;  // no run is longer
  return static_cast<int>(min(size - first, kMost));
}

// Element e of a word. NOTE: bfloat16 by hand; nvcc makes two instructions of unpack()'s upper
// half.
template <class T>
__device__ __forceinline__ float element(uint32_t word, int e) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, tile::bf16>) {
    return __uint_as_float(e == 0 ? word << 16 : word & 0xffff0000);
  } else {
    const float2 pair = tile::unpack<T>(word);
    return e == 0 ? pair.x : pair.y;
  }
}

template <class T>
__device__ __forceinline__ float element(const Load<T>& run, int e) {
  return element<T>(run.words.data[e / kPerWord<T>], e % kPerWord<T>);
}

// The magnitudes of the elements of a word, and the larger ones of those of two words.
template <class T>
__device__ __forceinline__ uint32_t magnitudes(uint32_t word) {
  return word & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu);
}

template <class T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return sizeof(T) == 4 ? max(a, b) : __vmaxu2(a, b);
}

// A word of the largest number of T that is not above x.
template <class T>
__device__ __forceinline__ uint32_t word_below(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(x);
  } else if constexpr (std::is_same_v<T, tile::bf16>) {
    return __byte_perm(__float_as_uint(x), 0, 0x3232);
  } else {
    return __half_as_ushort(__float2half_rz(x)) * 0x10001u;
  }
}

// The float32 bits of element e of a word of magnitudes. They are in the same order.
template <class T>
__device__ __forceinline__ uint32_t amax_bits(uint32_t word, int e) {
  return __float_as_uint(element<T>(word, e));
}

template <class T>
__device__ __forceinline__ uint32_t largest(uint32_t word) {
  const uint32_t first = amax_bits<T>(word, 0);
  return sizeof(T) == 4 ? first : max(first, amax_bits<T>(word, 1));
}

// The largest finite number of format F is 1.75 * 2^kLargestExponent.
template <class F>
inline constexpr int kLargestExponent = 8;
template <>
inline constexpr int kLargestExponent<tile::e5m2> = 15;

struct Scale {
  uint32_t bits;  // of the float32
  float inverse;
};

// The smallest power of two, 2^-126 or more, that takes `amax` to the largest number of F or below;
// NaN where amax is not finite. With a mantissa above 1.75, and then alone, the addition carries
// into the exponent. The inverse, 2^126 at most, is a normal number, so that products with it are
// exact (but for those too small for F by far).
template <class F>
__device__ __forceinline__ Scale scale_of(uint32_t amax) {
  constexpr uint32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;
  const uint32_t exponent = (amax + 0x1fffff) >> 23;
  const uint32_t field = max(exponent, kLargestExponent<F> + 1u) - kLargestExponent<F>;
  const bool finite = amax < kInfinity;
  return {finite ? field << 23 : kNan, __uint_as_float(finite ? (254 - field) << 23 : kNan)};
}

// The elements of a run times `inverse`, cast.
template <class F, class T>
__device__ __forceinline__ Run<uint8_t, kVec<T>> cast(const Load<T>& x, float inverse) {
  Run<uint8_t, kVec<T>> y;
#pragma unroll
  for (int e = 0; e < kVec<T>; e += 4) {
    y.words.data[e / 4] =
        tile::pack<F>(element<T>(x, e) * inverse, element<T>(x, e + 1) * inverse,
                      element<T>(x, e + 2) * inverse, element<T>(x, e + 3) * inverse);
  }
  return y;
}

}  // namespace jaxkern::quantize

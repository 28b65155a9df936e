// Values of four bits in words, expanded to pairs of 16-bit ones.
//
// A word has eight: four in the lower half, four in the upper, of which pair i takes value i of
// each. Bits of a half, from the highest, where s is the sign of an e2m1 value and a, b, c the
// rest:
//
//     e2m1:     s0 c3 s3 s1 a3 b3 s2 a0 b0 c0 a1 b1 c1 a2 b2 c2
//     integers: value 3, 2, 1 and 0, to each of which 8 is added
#pragma once

#include <type_traits>

#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::tile {

template <class T>
using PairOf = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;

template <class T>
__device__ __forceinline__ PairOf<T>& as_pair(uint32_t& x) {
  return *reinterpret_cast<PairOf<T>*>(&x);
}
template <class T>
__device__ __forceinline__ PairOf<T> both(T x) {
  return {x, x};
}

// e2m1, 2^-126 of its value in bfloat16, 2^-14 in float16.
//
// NOTE: logic and shifts go through one pipe, of half the rate of issue. With `eight` that the
// compiler does not know to be 8, shifts to the left are multiplications, which have another.
template <class T>
__device__ __forceinline__ void expand_e2m1(uint32_t word, uint32_t (&a)[4], uint32_t eight = 8);

template <>
__device__ __forceinline__ void expand_e2m1<bf16>(uint32_t word, uint32_t (&a)[4], uint32_t eight) {
  constexpr uint32_t kAll = 0x81c081c0;
  a[0] = word & kAll;
  a[1] = word * eight & kAll;
  a[2] = word * (eight * eight) & kAll;
  // Of the bits 6, 5, 3 and 2 a product makes copies, none over another: c stays, a and b move by
  // 5, the sign by 10.
  a[3] = (word >> 8 & 0x006c006c) * (1 + (1 << 5) + (1 << 10)) & kAll;
}
template <>
__device__ __forceinline__ void expand_e2m1<f16>(uint32_t word, uint32_t (&a)[4], uint32_t eight) {
  constexpr uint32_t kSign = 0x80008000, kRest = 0x0e000e00;
  const uint32_t by3 = word * eight, by6 = by3 * eight, by9 = by6 * eight;
  a[0] = (word & kSign) | (by3 & kRest);
  a[1] = (by3 & kSign) | (by6 & kRest);
  a[2] = (by6 & kSign) | (by9 & kRest);
  a[3] = (word << 2 & kSign) | (word & 0x0c000c00) | (word >> 5 & 0x02000200);
}

// Integers and 8, 128 or 1024 larger.
template <class T>
__device__ __forceinline__ void expand_integers(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kLarger = std::is_same_v<T, bf16> ? 0x43004300 : 0x64006400;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = ptx::select_or(word >> 4 * i, 0x000f000f, kLarger);
}

}  // namespace jaxkern::tile

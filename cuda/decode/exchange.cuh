// What blocks send each other: bfloat16 values, float32 sums, and ranks by which they draw tokens,
// all of which tell whether they are there.
//
// Until a value comes, its place holds a NaN that no arithmetic gives. So whoever reads all values
// has them, and no fence orders anything; counters only tell when it is worth to look. The
// block that sent a value clears its place when all have read it. There are two places, for layers
// in turn, so that this is a layer's time before the next value comes. NOTE: a release costs 0.8 us
// on an H200, because it waits for all that the multiprocessor has under way.
#pragma once

#include "cuda/decode/plan.h"
#include "cuda/tile/ptx/atomic.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::decode {

inline constexpr uint16_t kNothing = 0xffff;  // arithmetic gives 0x7fff
inline constexpr uint32_t kNoSum = 0xffffffff;
inline constexpr uint64_t kNoRank = ~uint64_t{0};  // NaN has the lowest ranks

__device__ __forceinline__ void send(tile::bf16* to, tile::bf16 value) {
  tile::ptx::store_relaxed(reinterpret_cast<uint16_t*>(to), __bfloat16_as_ushort(value));
}
__device__ __forceinline__ void send(float* to, float value) {
  tile::ptx::store_relaxed(reinterpret_cast<uint32_t*>(to), __float_as_uint(value));
}
__device__ __forceinline__ void send(uint64_t* to, uint64_t rank) {
  tile::ptx::store_relaxed(to, rank);
}
__device__ __forceinline__ void clear(tile::bf16* place) {
  tile::ptx::store_relaxed(reinterpret_cast<uint16_t*>(place), kNothing);
}
__device__ __forceinline__ void clear(float* place) {
  tile::ptx::store_relaxed(reinterpret_cast<uint32_t*>(place), kNoSum);
}

__device__ __forceinline__ void clear(uint64_t* place) { tile::ptx::store_relaxed(place, kNoRank); }

// Eight values or four sums.
struct alignas(16) Word {
  static constexpr int kValues = 8;
  uint32_t data[4];
};

__device__ __forceinline__ void send(tile::bf16* to, const Word& word) {
  tile::ptx::store_relaxed_128(to, word.data);
}
__device__ __forceinline__ Word peek(const void* from) {
  Word word;
  tile::ptx::load_relaxed_128(from, word.data);
  return word;
}

// Whether all values of some words are there.
template <int kCount>
__device__ __forceinline__ bool have_values(const Word (&words)[kCount]) {
  uint32_t most = 0;  // of each half
#pragma unroll
  for (const Word& word : words) {
#pragma unroll
    for (uint32_t pair : word.data) most = __vmaxu2(most, pair);
  }
  return most < 0xffff0000 && (most & 0xffff) != 0xffff;
}
__device__ __forceinline__ bool has_values(const Word& word) {
  const Word words[] = {word};
  return have_values(words);
}
// Whether all four sums are.
__device__ __forceinline__ bool has_sums(const Word& word) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) all &= word.data[i] != kNoSum;
  return all;
}

__device__ __forceinline__ void arrive(Counter& counter) {
  tile::ptx::add_relaxed(&counter.count, 1);
}

// Until the counter has come to `target`, around which it may wrap. kAcquire: what was before the
// fences of those who arrived is there then.
template <bool kAcquire = false>
__device__ __forceinline__ void wait_for(Counter& counter, uint32_t target) {
  const auto count = [&] {
    return kAcquire ? tile::ptx::load_acquire(&counter.count)
                    : tile::ptx::load_relaxed(&counter.count);
  };
  while (static_cast<int>(count() - target) < 0) {
  }
}

}  // namespace jaxkern::decode

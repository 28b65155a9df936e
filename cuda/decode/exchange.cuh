// What blocks send each other: words of seven bfloat16 and a tag.
//
// A word is written and read by one access of 16 bytes, so whoever finds the tag that it waits for
// has the values, too: no fence orders anything. Counters only tell when it is worth to look.
// NOTE: a release costs 0.8 us on an H200, because it waits for all that the multiprocessor has
// under way; a read of a word about 0.7.
#pragma once

#include "cuda/decode/params.h"
#include "cuda/tile/ptx/atomic.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::decode {

__device__ __forceinline__ Word make_word(const float (&values)[kWordValues], uint32_t tag) {
  using tile::bf16;
  Word word;
  word.data[0] = tile::pack<bf16>(values[0], values[1]);
  word.data[1] = tile::pack<bf16>(values[2], values[3]);
  word.data[2] = tile::pack<bf16>(values[4], values[5]);
  word.data[3] = (tile::pack<bf16>(values[6], 0.0f) & 0xffff) | tag << 16;
  return word;
}

// Value i of a word, for an i that is known at compile time.
__device__ __forceinline__ float value_of(const Word& word, int i) {
  const float2 pair = tile::unpack<tile::bf16>(word.data[i / 2]);
  return i % 2 ? pair.y : pair.x;
}

__device__ __forceinline__ bool has_tag(const Word& word, uint32_t tag) {
  return word.data[3] >> 16 == tag;
}

__device__ __forceinline__ void send(Word* to, const Word& word) {
  tile::ptx::store_relaxed_128(to, word.data);
}

__device__ __forceinline__ Word peek(const Word* from) {
  Word word;
  tile::ptx::load_relaxed_128(from, word.data);
  return word;
}

// Until the word has its tag.
__device__ __forceinline__ void settle(Word& word, const Word* from, uint32_t tag) {
  while (!has_tag(word, tag)) word = peek(from);
}

// `value` of each of the first 28 lanes, as words, which lanes 0 to 3 have. The whole warp calls.
__device__ __forceinline__ Word gather_word(float value, uint32_t tag) {
  float values[kWordValues];
#pragma unroll
  for (int i = 0; i < kWordValues; ++i) {
    values[i] = __shfl_sync(0xffffffffu, value, kWordValues * (threadIdx.x % kWarpWords) + i);
  }
  return make_word(values, tag);
}

__device__ __forceinline__ void arrive(Counter& counter) {
  tile::ptx::add_relaxed(&counter.count, 1);
}

// Until the counter has come to `target`, around which it may wrap.
__device__ __forceinline__ void wait_for(Counter& counter, uint32_t target) {
  while (static_cast<int>(tile::ptx::load_relaxed(&counter.count) - target) < 0) {
  }
}

}  // namespace jaxkern::decode

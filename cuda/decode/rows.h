// How the rows of a matrix are divided among the multiprocessors, and its values within a block of
// rows: see docs/decode.md.
#pragma once

#include <cstdint>

namespace jaxkern::decode {

inline constexpr int kSlice = 32;      // columns whose values lie together in a row
inline constexpr int kMaxRows = 128;   // of a block
inline constexpr int kWordValues = 7;  // bfloat16 that travel in one word, beside its tag
inline constexpr int kWarpWords = 4;   // that a warp makes
inline constexpr int kWarpRows = kWarpWords * kWordValues;  // values that it has for them

// N units, of one row or two (gate and up), of K columns, in blocks that are as even as can be.
struct Rows {
  int unit_rows, K;
  int each, extra, blocks;  // units of a block; the first `extra` blocks have one more
  int words;                // that carry a result of the largest block
  uint32_t words_magic;     // ceil(2^32 / words)

#ifdef __CUDACC__
  __device__ __forceinline__ int units(int block) const { return each + (block < extra); }
  __device__ __forceinline__ int first(int block) const {
    return block * each + (block < extra ? block : extra);
  }
  __device__ __forceinline__ int count() const { return blocks * each + extra; }
  __device__ __forceinline__ int all_words() const { return blocks * words; }
  // The block of a unit.
  __device__ __forceinline__ int block_of_unit(int unit) const {
    const int end = extra * (each + 1);  // of the larger ones
    return unit < end ? unit / (each + 1) : extra + (unit - end) / each;
  }
  // The block that word `index` of all is of.
  __device__ __forceinline__ int block_of(int index) const {
    return words == 1 ? index : static_cast<int>(__umulhi(index, words_magic));
  }
  // Warps that send a block's words.
  __device__ __forceinline__ int sending_warps() const {
    return (words + kWarpWords - 1) / kWarpWords;
  }
#endif
};

inline Rows make_rows(int units, int K, int unit_rows, int multiprocessors) {
  Rows rows = {};
  rows.unit_rows = unit_rows;
  rows.K = K;
  const int most = kMaxRows / unit_rows;
  rows.blocks = multiprocessors;
  while ((units + rows.blocks - 1) / rows.blocks > most) rows.blocks += multiprocessors;
  rows.each = units / rows.blocks;
  rows.extra = units % rows.blocks;
  rows.words = (rows.each + (rows.extra > 0) + kWordValues - 1) / kWordValues;
  rows.words_magic = static_cast<uint32_t>(((uint64_t{1} << 32) + rows.words - 1) / rows.words);
  return rows;
}

}  // namespace jaxkern::decode

// How the rows of a matrix are divided among the multiprocessors: see docs/decode.md.
#pragma once

#include <cstdint>

namespace jaxkern::decode {

inline constexpr int kSliceBytes = 64;  // of a row, which lie together
inline constexpr int kSlice = 32;       // columns of bfloat16 in so many
inline constexpr int kMaxRows = 136;    // of a block

// Rows that a block of a model with such heads has at most: as many as the largest matrices of
// common models have for each of 132 multiprocessors.
constexpr int max_rows(int head_dim) { return head_dim == 64 ? 128 : kMaxRows; }
// Bytes that are copied at once: two slices of so many rows. Shorter copies are slower.
constexpr int chunk_bytes(int head_dim) { return 2 * max_rows(head_dim) * kSliceBytes; }

// How a block of rows is cut into chunks: slices of one, chunks of all, and ceil(2^32 / slices).
struct Chunks {
  int slices, count;
  uint32_t magic;
};

// N units, of one row or two (gate and up), of K columns, in blocks that are as even as can be.
struct Rows {
  int unit_rows, K, columns;  // columns of a slice
  int each, extra, blocks;    // units of a block; the first `extra` blocks have one more
  int most;                   // units of any block
  Chunks chunks[2];           // of a block with `each` units, and of a larger one

#ifdef __CUDACC__
  __device__ __forceinline__ int units(int block) const { return each + (block < extra); }
  __device__ __forceinline__ int first(int block) const {
    return block * each + (block < extra ? block : extra);
  }
  __device__ __forceinline__ Chunks chunks_of(int block) const {
    return block < extra ? chunks[1] : chunks[0];
  }
  __host__ __device__
#endif
      int count() const {
    return blocks * each + extra;
  }
};

inline Rows make_rows(int units, int K, int columns, int unit_rows, int multiprocessors,
                      int head_dim) {
  Rows rows = {};
  rows.unit_rows = unit_rows;
  rows.K = K;
  rows.columns = columns;
  const int most = max_rows(head_dim) / unit_rows;
  rows.blocks = multiprocessors;
  while ((units + rows.blocks - 1) / rows.blocks > most) rows.blocks += multiprocessors;
  rows.each = units / rows.blocks;
  rows.extra = units % rows.blocks;
  rows.most = rows.each + (rows.extra > 0);
  for (int larger = 0; larger < 2; ++larger) {
    const int block_rows = (rows.each + larger) * unit_rows;
    if (block_rows == 0) continue;
    const int slices = chunk_bytes(head_dim) / (block_rows * kSliceBytes);
    const auto magic = static_cast<uint32_t>(((uint64_t{1} << 32) + slices - 1) / slices);
    rows.chunks[larger] = {slices, (K / columns + slices - 1) / slices, magic};
  }
  return rows;
}

}  // namespace jaxkern::decode

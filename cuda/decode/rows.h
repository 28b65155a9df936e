// How the rows of a matrix are divided among the multiprocessors: see docs/decode.md.
#pragma once

#include <cstdint>

#include "cuda/decode/params.h"

namespace jaxkern::decode {

inline constexpr int kSliceBytes = 64;  // of a row's values, which lie together
inline constexpr int kSlice = 32;       // columns of bfloat16 in so many
inline constexpr int kMaxRows = 136;    // of a block

// Rows that a block of a model with such heads has at most: as many as the largest matrices of
// common models have for each of 132 multiprocessors.
constexpr int max_rows(int head_dim) { return head_dim == 64 ? 128 : kMaxRows; }
// Of a row in a slice: columns, and bytes of the scales that follow the values of all rows.
struct SliceFormat {
  int columns, scale_bytes;
};
constexpr SliceFormat slice_format(WeightFormat format) {
  if (format == WeightFormat::kBf16) return {kSlice, 0};
  if (format == WeightFormat::kFp8) return {2 * kSlice, 0};
  return {4 * kSlice, 8};
}
// Bytes of a slice of so many rows, a multiple of 16.
constexpr int slice_bytes(int rows, int scale_bytes) {
  return rows * kSliceBytes + (rows * scale_bytes + 15) / 16 * 16;
}
// Bytes that are copied at once: two slices of the largest block. Shorter copies are slower.
constexpr int chunk_bytes(int head_dim, int scale_bytes) {
  return 2 * slice_bytes(max_rows(head_dim), scale_bytes);
}

// How a block of rows is cut into chunks: slices of one, chunks of all, ceil(2^32 / slices), and
// the bytes of a slice.
struct Chunks {
  int slices, count;
  uint32_t magic;
  int slice_bytes;
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
  // Where a block of a layer begins, in bytes. The first block of the next layer: how many there
  // are.
#ifdef __CUDACC__
  __host__ __device__
#endif
      int64_t place(int layer, int block) const {
    const int64_t bytes = chunks[0].slice_bytes, more = chunks[1].slice_bytes - bytes;
    const int64_t all = blocks * bytes + extra * more;  // of a slice
    const int64_t before = block * bytes + (block < extra ? block : extra) * more;
    return (layer * all + before) * (K / columns);
  }
};

inline Rows make_rows(int units, int K, SliceFormat format, int unit_rows, int multiprocessors,
                      int head_dim) {
  Rows rows = {};
  rows.unit_rows = unit_rows;
  rows.K = K;
  rows.columns = format.columns;
  const int most = max_rows(head_dim) / unit_rows;
  rows.blocks = multiprocessors;
  while ((units + rows.blocks - 1) / rows.blocks > most) rows.blocks += multiprocessors;
  rows.each = units / rows.blocks;
  rows.extra = units % rows.blocks;
  rows.most = rows.each + (rows.extra > 0);
  for (int larger = 0; larger < 2; ++larger) {
    const int block_rows = (rows.each + larger) * unit_rows;
    if (block_rows == 0) continue;
    const int bytes = slice_bytes(block_rows, format.scale_bytes);
    const int slices = chunk_bytes(head_dim, format.scale_bytes) / bytes;
    const auto magic = static_cast<uint32_t>(((uint64_t{1} << 32) + slices - 1) / slices);
    rows.chunks[larger] = {slices, (K / rows.columns + slices - 1) / slices, magic, bytes};
  }
  return rows;
}

}  // namespace jaxkern::decode

// Which keys a query attends to. Causal masks are aligned top-left, as in jax.nn: query t sees keys
// 0 .. t, whatever the two lengths.
#pragma once

#include <cmath>

#include "cuda/tile/reg.cuh"

namespace jaxkern {

template <bool kCausal>
struct AttentionMask {
  int T, S;

  // Keys in [0, key_end) can be seen by queries before `row_end`.
  __device__ __forceinline__ int key_end(int row_end) const {
    return kCausal ? min(S, row_end) : S;
  }
  // Every query from `row` on sees every key in [0, dense_key_end).
  __device__ __forceinline__ int dense_key_end(int row) const {
    return kCausal ? min(S, row + 1) : S;
  }
  // Queries in [query_begin, T) can see keys from `key` on.
  __device__ __forceinline__ int query_begin(int key) const { return kCausal ? key : 0; }
  // Every query from here on sees all keys before `key_end`, if those exist.
  __device__ __forceinline__ int dense_query_begin(int key_end) const {
    return kCausal ? key_end - 1 : 0;
  }

  // logits: query rows from `row0`, key columns from `col0`. Hidden ones become -inf.
  template <int kCols>
  __device__ __forceinline__ void apply(tile::RegisterTile<float, 64, kCols>& logits, int row0,
                                        int col0) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int limit = dense_key_end(row0 + tile::fragment_row(i)) - col0;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const int col = tile::fragment_col(j);
        if (col >= limit) logits.at(j, i, 0) = -INFINITY;
        if (col + 1 >= limit) logits.at(j, i, 1) = -INFINITY;
      }
    }
  }

  // logits: key rows from `row0`, query columns from `col0`.
  template <int kCols>
  __device__ __forceinline__ void apply_transposed(tile::RegisterTile<float, 64, kCols>& logits,
                                                   int row0, int col0) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = row0 + tile::fragment_row(i);
      const int first = (key < S ? query_begin(key) : T) - col0;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const int col = tile::fragment_col(j);
        if (col < first) logits.at(j, i, 0) = -INFINITY;
        if (col + 1 < first) logits.at(j, i, 1) = -INFINITY;
      }
    }
  }
};

}  // namespace jaxkern

// What the attention launchers take: plain pointers and sizes. Shape letters: B batch, T query
// length, S key length, N query heads, K key/value heads, H head dim.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

struct AttentionShape {
  int64_t B, T, S, N, K, H;
};

// What becomes of the logits, and which keys a query sees: query t stands at key t + shift, where
// shift is 0 or, with bottom_right, what aligns the last query with the last key of the sequence;
// it sees the keys from `left` before that to `right` after it. A mask over segments and lengths
// comes on top.
struct AttentionOptions {
  float scale;      // > 0
  float soft_cap;   // logits become soft_cap * tanh(logits / soft_cap); 0: they stay
  int left, right;  // >= 0; kAttentionUnbounded: all keys on that side
  bool bottom_right;
  const int* query_lengths = nullptr;   // (B) or null; the output is zero from there on
  const int* key_lengths = nullptr;     // (B) or null
  const int* query_segments = nullptr;  // (B, T) or null; a query sees keys of its own segment
  const int* key_segments = nullptr;    // (B, S) or null
};

constexpr int kAttentionUnbounded = 0x7fffffff;

struct AttentionFwdParams {
  DType dtype;  // kBFloat16 or kFloat16
  AttentionShape shape;
  AttentionOptions options;
  const void* query;  // (B, T, N, H)
  const void* key;    // (B, S, K, H)
  const void* value;  // (B, S, K, H)
  void* out;          // (B, T, N, H)
  float* lse;         // (B, N, T) natural logarithm; kHiddenLse where a query sees no key
  int* workspace;     // (attention_fwd_workspace(shape))
};

struct AttentionBwdParams {
  DType dtype;  // kBFloat16 or kFloat16
  AttentionShape shape;
  AttentionOptions options;
  const void* query;    // (B, T, N, H)
  const void* key;      // (B, S, K, H)
  const void* value;    // (B, S, K, H)
  const void* out;      // (B, T, N, H)
  const float* lse;     // (B, N, T)
  const void* dout;     // (B, T, N, H)
  const float* dlse;    // (B, N, T)
  void* dquery;         // (B, T, N, H)
  void* dkey;           // (B, S, K, H)
  void* dvalue;         // (B, S, K, H)
  float* lse_log2;      // (B, N, Tp) workspace, Tp = attention_padded_length(T)
  float* delta;         // (B, N, Tp) workspace
  float* dquery_accum;  // (B, N, Tp, H) workspace
  int* workspace;       // (attention_bwd_workspace(shape))
  bool deterministic;
};

// Workspaces have whole blocks of queries, be they 64, kAttentionTallBlockT or 128: no bounds to
// check, every row 16-byte aligned.
constexpr int64_t kAttentionPadding = 128;
constexpr int kAttentionTallBlockT = 80;
constexpr int64_t attention_padded_length(int64_t T) {
  return (T + kAttentionTallBlockT - 1 + kAttentionPadding - 1) / kAttentionPadding *
         kAttentionPadding;
}

// Rows that the ranges of a band mask are kept for: one for all and, with segments, one for each.
constexpr int kAttentionGranule = 64;
constexpr int64_t kAttentionGranuleBytes = 16 + 8 * kAttentionGranule;
constexpr int64_t attention_granules(int64_t rows) {
  return (rows + kAttentionGranule - 1) / kAttentionGranule;
}

// Forward: a tile counter in four words, then granules of queries.
constexpr int64_t attention_fwd_workspace(const AttentionShape& shape) {
  return 4 + kAttentionGranuleBytes / 4 * shape.B * attention_granules(shape.T);
}

// Backward: granules of keys, the sum of dout over queries that see no key for
// each key/value head, and up to eight turns for each block of queries.
constexpr int64_t attention_bwd_workspace(const AttentionShape& shape) {
  return kAttentionGranuleBytes / 4 * shape.B * attention_granules(shape.S) +
         shape.B * shape.K * shape.H + shape.B * shape.N * attention_padded_length(shape.T) / 8;
}

}  // namespace jaxkern

// What the attention launchers take: plain pointers and sizes. Shape letters: B batch, T query
// length, S key length, N query heads, K key/value heads, H head dim.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

struct AttentionShape {
  int64_t B, T, S, N, K, H;
};

struct AttentionFwdParams {
  DType dtype;  // kBFloat16 or kFloat16
  AttentionShape shape;
  const void* query;  // (B, T, N, H)
  const void* key;    // (B, S, K, H)
  const void* value;  // (B, S, K, H)
  void* out;          // (B, T, N, H)
  float* lse;         // (B, N, T) natural logarithm
  int* tile_counter;  // (1) workspace
  float scale;        // > 0
  bool is_causal;
};

struct AttentionBwdParams {
  DType dtype;  // kBFloat16 or kFloat16
  AttentionShape shape;
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
  float scale;          // > 0
  bool is_causal;
};

// Workspaces have whole blocks of queries: no bounds to check, every row 16-byte aligned.
constexpr int64_t kAttentionPadding = 128;
constexpr int64_t attention_padded_length(int64_t T) {
  return (T + kAttentionPadding - 1) / kAttentionPadding * kAttentionPadding;
}

}  // namespace jaxkern

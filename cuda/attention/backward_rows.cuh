// The memory-bound kernels around the attention backward kernel.
//   pre-process    delta = rowsum(out * dout) - dlse, lse in base 2, and a zeroed accumulator
//   post-process   dquery = scale * accumulator, rounded, from fragment order to (B, T, N, H)
// and two small ones that few calls need:
//   hidden rows    the part of dvalue that comes from queries which see no key
//   turns          the order in which blocks of keys add to dquery, if it must be repeatable
// delta is taken from the rounded output: then rows of dS sum to zero up to rounding of dS itself.
#pragma once

#include "cuda/attention/params.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

struct AttentionRowsParams {
  const void* out;      // (B, T, N, H)
  const void* dout;     // (B, T, N, H)
  const float* lse;     // (B, N, T)
  const float* dlse;    // (B, N, T)
  float* lse_log2;      // (B, N, Tp); +inf where a query sees no key, so that none has a weight
  float* delta;         // (B, N, Tp); 0 there
  float* dquery_accum;  // (B, N, Tp, H)
  void* dquery;         // (B, T, N, H)
  float scale;
  int T, N, padded_T;
};

constexpr int kRowsThreads = 256;

// Blocks of `rows` queries, numbered along x alone, since the y and z of a grid end at 65535.
struct RowBlock {
  int row, head, batch;

  __device__ __forceinline__ RowBlock(const AttentionRowsParams& p, int rows) {
    const int blocks = p.padded_T / rows;
    row = blockIdx.x % blocks * rows;
    head = blockIdx.x / blocks % p.N;
    batch = blockIdx.x / blocks / p.N;
  }
};

// One block: kRowsThreads / kLanes queries of one head; H / 8 lanes to a query.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kRowsThreads)
    attention_bwd_preprocess_kernel(const AttentionRowsParams p) {
  constexpr int kLanes = kHeadDim / 8;  // 16 bytes each
  constexpr int kRows = kRowsThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const RowBlock at_block(p, kRows);
  const int head = at_block.head, batch = at_block.batch;
  const int t = at_block.row + threadIdx.x / kLanes;
  const int64_t head_row = int64_t{batch} * p.N + head;

  float dot = 0.0f;
  if (t < p.T) {
    const int64_t at = ((int64_t{batch} * p.T + t) * p.N + head) * kHeadDim + 8 * lane;
    const uint4 out = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.out) + at);
    const uint4 dout = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.dout) + at);
    const uint32_t x[4] = {out.x, out.y, out.z, out.w};
    const uint32_t y[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = tile::unpack<T>(x[i]), b = tile::unpack<T>(y[i]);
      dot += a.x * b.x + a.y * b.y;
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, step);
  }
  if (lane == 0) {
    const int64_t row = head_row * p.T + t, padded_row = head_row * p.padded_T + t;
    const bool hidden = t >= p.T || p.lse[row] == kHiddenLse;
    p.lse_log2[padded_row] = hidden ? INFINITY : p.lse[row] * tile::kLog2E;
    p.delta[padded_row] = hidden ? 0.0f : dot - p.dlse[row];
  }
  float4* accum =
      reinterpret_cast<float4*>(p.dquery_accum + (head_row * p.padded_T + at_block.row) * kHeadDim);
#pragma unroll
  for (int i = 0; i < kRows * kHeadDim / 4 / kRowsThreads; ++i) {
    accum[i * kRowsThreads + threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// One block of H threads: one key/value head. hidden_dout = sum of dout / S over its hidden
// queries, which are few: kAhead blocks of them are searched at a time.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    attention_bwd_hidden_kernel(const AttentionRowsParams p, const int* query_lengths,
                                float* hidden_dout, int group, int S) {
  const int kv_heads = p.N / group;
  const int batch = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
  const int length = query_lengths == nullptr ? p.T : query_lengths[batch];
  constexpr int kAhead = 16;
  __shared__ bool hidden[kHeadDim];
  float sum = 0.0f;
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const float* lse = p.lse + (int64_t{batch} * p.N + head) * p.T;
    for (int t0 = 0; t0 < length; t0 += kAhead * kHeadDim) {
      float ahead[kAhead];  // read all at once, before any is looked at
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        ahead[a] = lse[min(t0 + a * kHeadDim + static_cast<int>(threadIdx.x), length - 1)];
      }
      uint32_t found = 0;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const bool inside = t0 + a * kHeadDim + static_cast<int>(threadIdx.x) < length;
        found |= (inside && ahead[a] == kHiddenLse) << a;
      }
      if (!__syncthreads_or(found)) continue;
      for (int a = 0; a < kAhead; ++a) {
        hidden[threadIdx.x] = found >> a & 1;
        __syncthreads();
        for (int i = 0; i < kHeadDim; ++i) {
          if (!hidden[i]) continue;
          const int64_t row = (int64_t{batch} * p.T + t0 + a * kHeadDim + i) * p.N + head;
          sum += static_cast<float>(static_cast<const T*>(p.dout)[row * kHeadDim + threadIdx.x]);
        }
        __syncthreads();
      }
    }
  }
  hidden_dout[int64_t{blockIdx.x} * kHeadDim + threadIdx.x] = sum / S;
}

// One thread: one query block of one head. Its turns go to the first work that visits it.
template <class Backward>
__global__ void __launch_bounds__(kRowsThreads)
    attention_bwd_turns_kernel(const typename Backward::Params p, int64_t count, int heads) {
  const int64_t index = int64_t{blockIdx.x} * kRowsThreads + threadIdx.x;
  if (index >= count) return;
  const int blocks = p.padded_T / Backward::kBlockT, block = index % blocks;
  const int batch = index / blocks / heads;
  int first = 0;
  for (; first < p.order.blocks; ++first) {
    const auto visited = Backward::query_blocks(p.mask, batch, Backward::first_key(p, first));
    if (visited.begin <= block && block < visited.end) break;
  }
  for (int part = 0; part < Backward::kTurnParts; ++part) {
    *Backward::turn(p, index * Backward::kBlockT, part) = first;
  }
}

// One block: one query block of one head; a warpgroup to each of the two parts of dQ.
template <class Backward>
__global__ void __launch_bounds__(kRowsThreads)
    attention_bwd_postprocess_kernel(const AttentionRowsParams p) {
  using T = typename Backward::T;
  constexpr int kHeadDim = Backward::kHeadDim, kBlockT = Backward::kBlockT;
  constexpr bool kTransposed = Backward::kTransposed;  // rows of a part are columns of dQ
  constexpr int kPart = Backward::kPart, kCols = kPart / 64;
  constexpr int kPartT = kTransposed ? kCols : 64, kPartH = kTransposed ? 64 : kCols;
  constexpr int kColParts = kHeadDim / kPartH;  // 1: parts are query halves; 2: head dim halves
  static_assert(kRowsThreads / tile::kWarpgroupSize * kPart == kBlockT * kHeadDim, "two parts");
  const RowBlock at_block(p, kBlockT);
  const int head = at_block.head, batch = at_block.batch;
  const int part = threadIdx.x / tile::kWarpgroupSize;
  __shared__ tile::SharedTile<T, kPartT, kPartH> tiles[2];

  tile::RegisterTile<float, 64, kCols> accum;
  const int64_t row = (int64_t{batch} * p.N + head) * p.padded_T + at_block.row;
  tile::load_fragments(accum, p.dquery_accum + row * kHeadDim + part * kPart);
  tile::scale(accum, p.scale);
  tile::RegisterTile<T, 64, kCols> rounded;
  tile::convert(rounded, accum);
  if constexpr (kTransposed) {
    tile::store_transposed(tiles[part], rounded);
  } else {
    tile::store(tiles[part], 0, rounded);
  }
  __syncthreads();

  const int t0 = at_block.row + kPartT * (part / kColParts);
  const int h0 = kPartH * (part % kColParts);
  constexpr int kLanes = kPartH / 8;  // 16 bytes each
  constexpr int kRows = tile::kWarpgroupSize / kLanes;
  static_assert(kPartT % kRows == 0, "threads go over a part in whole rounds");
  const int thread = threadIdx.x % tile::kWarpgroupSize;
#pragma unroll
  for (int i = 0; i < kPartT / kRows; ++i) {
    const int r = kRows * i + thread / kLanes, c = 8 * (thread % kLanes);
    const int t = t0 + r;
    if (t >= p.T) continue;
    const int64_t at = ((int64_t{batch} * p.T + t) * p.N + head) * kHeadDim + h0 + c;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.dquery) + at) =
        *reinterpret_cast<const uint4*>(tiles[part].chunk(r, c));
  }
}

}  // namespace jaxkern

// Instances of the attention backward, which is a pre-process, a main and a post-process kernel:
// JAXKERN_ELEMENT and JAXKERN_HEAD_DIM come from the table in CMakeLists.txt.
#include "cuda/attention/backward_rows.cuh"
#include "cuda/attention/backward_sm90.cuh"
#include "cuda/attention/backward_wide_sm90.cuh"
#include "cuda/attention/instances.h"
#include "cuda/attention/order.h"
#include "cuda/attention/ranges.cuh"
#include "cuda/attention/tensor_maps.h"
#include "cuda/host/launch.h"

namespace jaxkern {

namespace {

// Whether some query may see no key.
bool may_hide_queries(const AttentionShape& shape, const AttentionOptions& o) {
  if (o.query_lengths != nullptr || o.query_segments != nullptr) return true;
  const int64_t shift = o.bottom_right ? shape.S - shape.T : 0;
  return shift + o.right < 0 || shape.T - 1 + shift - o.left >= shape.S;
}

template <class Backward>
cudaError_t run_backward(void (*kernel)(typename Backward::Params),
                         const AttentionBwdParams& params, cudaStream_t stream) {
  using T = typename Backward::T;
  constexpr int kHeadDim = Backward::kHeadDim;
  constexpr int kPreprocessRows = kRowsThreads * 8 / kHeadDim;
  static_assert(Backward::kBlockT % kPreprocessRows == 0, "it must not pass the padded length");
  const AttentionShape& shape = params.shape;
  const AttentionOptions& options = params.options;
  const auto padded_T =
      static_cast<int>(tile::ceil_div(shape.T, Backward::kBlockT)) * Backward::kBlockT;
  auto* granules = reinterpret_cast<GranuleColumns*>(params.workspace);
  auto* hidden_dout = reinterpret_cast<float*>(granules + shape.B * attention_granules(shape.S));
  auto* turns = reinterpret_cast<int*>(hidden_dout + shape.B * shape.K * shape.H);

  typename Backward::Params p;
  const auto query_map = [&](CUtensorMap* map, const void* data) {
    return make_query_map(map, params.dtype, shape, data, Backward::kBlockT);
  };
  const auto key_map = [&](CUtensorMap* map, const void* data) {
    return make_key_map(map, params.dtype, shape, data, Backward::kBlockS);
  };
  if (cudaError_t error = query_map(&p.query, params.query)) return error;
  if (cudaError_t error = query_map(&p.dout, params.dout)) return error;
  if (cudaError_t error = key_map(&p.key, params.key)) return error;
  if (cudaError_t error = key_map(&p.value, params.value)) return error;
  if (cudaError_t error = key_map(&p.dkey, params.dkey)) return error;
  if (cudaError_t error = key_map(&p.dvalue, params.dvalue)) return error;
  const auto row_map = [&](CUtensorMap* map, const float* data) {
    return make_row_map(map, data, shape.B * shape.N, padded_T, Backward::kBlockT);
  };
  if (cudaError_t error = row_map(&p.lse_log2, params.lse_log2)) return error;
  if (cudaError_t error = row_map(&p.delta, params.delta)) return error;
  p.dquery_accum = params.dquery_accum;
  p.hidden_dout = may_hide_queries(shape, options) ? hidden_dout : nullptr;
  p.turns = params.deterministic ? turns : nullptr;
  p.last_keys_first = false;
  p.scale = options.scale;
  p.scale_log2 = (Backward::kSoftCap ? options.soft_cap : options.scale) * tile::kLog2E;
  p.cap_factor = Backward::kSoftCap ? options.scale / options.soft_cap : 0.0f;
  p.mask = Backward::Mask::of(shape, options, granules);
  p.kv_heads = static_cast<int>(shape.K);
  p.group = static_cast<int>(shape.N / shape.K);
  p.padded_T = padded_T;
  p.order = {
      .blocks = static_cast<int>(tile::ceil_div(shape.S, Backward::kWorkS)),
      .heads = static_cast<int>(shape.B * shape.K),
      .section = 1,
  };
  // Under a mask a block of keys begins with the queries that see its last key. If it adds to dQ
  // after the keys that follow it, those are a step ahead already; without a mask all begin with
  // the same queries, and few should be in line for the same head.
  if (Backward::kMask != MaskKind::kFull) {
    p.order.section = kv_heads_in_backward_section(8 * shape.T * shape.H * p.group);
    p.last_keys_first = params.deterministic;
  } else if (params.deterministic) {
    p.order.section = heads_in_line(kHeadDim);
  }

  const AttentionRowsParams rows = {
      .out = params.out,
      .dout = params.dout,
      .lse = params.lse,
      .dlse = params.dlse,
      .lse_log2 = params.lse_log2,
      .delta = params.delta,
      .dquery_accum = params.dquery_accum,
      .dquery = params.dquery,
      .scale = options.scale,
      .T = static_cast<int>(shape.T),
      .N = static_cast<int>(shape.N),
      .padded_T = padded_T,
  };
  const auto blocks = [&](int rows_per_block) {
    return padded_T / rows_per_block * shape.N * shape.B;
  };
  if (cudaError_t error = launch(attention_bwd_preprocess_kernel<T, kHeadDim>,
                                 blocks(kPreprocessRows), kRowsThreads, 0, stream, rows)) {
    return error;
  }
  if (cudaError_t error = launch_ranges(p.mask, shape.B, granules, params.deterministic, stream))
    return error;
  if (p.hidden_dout != nullptr) {
    if (cudaError_t error =
            launch(attention_bwd_hidden_kernel<T, kHeadDim>, shape.B * shape.K, kHeadDim, 0, stream,
                   rows, options.query_lengths, hidden_dout, p.group, static_cast<int>(shape.S))) {
      return error;
    }
  }
  if (p.turns != nullptr) {
    const int64_t count = shape.B * shape.N * padded_T / Backward::kBlockT;
    if (cudaError_t error =
            launch(attention_bwd_turns_kernel<Backward>, tile::ceil_div(count, kRowsThreads),
                   kRowsThreads, 0, stream, p, count, static_cast<int>(shape.N))) {
      return error;
    }
  }
  if (cudaError_t error = launch(kernel, int64_t{p.order.count()} * Backward::kClusterBlocks,
                                 Backward::kThreads, Backward::kSharedBytes, stream, p)) {
    return error;
  }
  return launch(attention_bwd_postprocess_kernel<Backward>, blocks(Backward::kBlockT), kRowsThreads,
                0, stream, rows);
}

}  // namespace

template <class T, int kHeadDim, MaskKind kMask, bool kSoftCap>
cudaError_t launch_backward(const AttentionBwdParams& params, cudaStream_t stream) {
  if constexpr (kHeadDim > 128) {
    using Wide = AttentionBackwardWide<T, kHeadDim, kMask, kSoftCap>;
    return run_backward<Wide>(attention_bwd_wide_sm90_kernel<Wide>, params, stream);
  } else {
    if constexpr (kHeadDim == 128 && !kSoftCap) {
      using Tall = AttentionBackward<T, kHeadDim, kMask, kSoftCap, true>;
      if (params.shape.T >= attention_bwd_tall_from(kMask)) {
        return run_backward<Tall>(attention_bwd_sm90_kernel<Tall>, params, stream);
      }
    }
    using Low = AttentionBackward<T, kHeadDim, kMask, kSoftCap, false>;
    return run_backward<Low>(attention_bwd_sm90_kernel<Low>, params, stream);
  }
}

#define JAXKERN_INSTANCE(kMask, kSoftCap)                                                        \
  template cudaError_t launch_backward<tile::JAXKERN_ELEMENT, JAXKERN_HEAD_DIM, MaskKind::kMask, \
                                       kSoftCap>(const AttentionBwdParams&, cudaStream_t)
JAXKERN_INSTANCE(kFull, false);
JAXKERN_INSTANCE(kCausal, false);
JAXKERN_INSTANCE(kBand, false);
JAXKERN_INSTANCE(kBand, true);
#undef JAXKERN_INSTANCE

}  // namespace jaxkern

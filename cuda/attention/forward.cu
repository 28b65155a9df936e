// Instances of the attention forward kernel: JAXKERN_ELEMENT and JAXKERN_HEAD_DIM come from the
// table in CMakeLists.txt.
#include <algorithm>

#include "cuda/attention/forward_sm90.cuh"
#include "cuda/attention/instances.h"
#include "cuda/attention/order.h"
#include "cuda/attention/ranges.cuh"
#include "cuda/attention/tensor_maps.h"
#include "cuda/host/device.h"
#include "cuda/host/launch.h"

namespace jaxkern {

namespace {

template <class Forward>
cudaError_t run_forward(const AttentionFwdParams& params, cudaStream_t stream) {
  using T = typename Forward::T;
  const AttentionShape& shape = params.shape;
  const AttentionOptions& options = params.options;
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;

  typename Forward::Params p;
  const auto query_map = [&](CUtensorMap* map, const void* data) {
    return make_query_map(map, params.dtype, shape, data, Forward::kBlockT);
  };
  const auto key_map = [&](CUtensorMap* map, const void* data) {
    return make_key_map(map, params.dtype, shape, data, Forward::kBlockS);
  };
  if (cudaError_t error = query_map(&p.query, params.query)) return error;
  if (cudaError_t error = query_map(&p.out, params.out)) return error;
  if (cudaError_t error = key_map(&p.key, params.key)) return error;
  if (cudaError_t error = key_map(&p.value, params.value)) return error;
  p.value_data = static_cast<const T*>(params.value);
  p.lse = params.lse;
  p.scale_log2 = (Forward::kSoftCap ? options.soft_cap : options.scale) * tile::kLog2E;
  p.cap_factor = Forward::kSoftCap ? options.scale / options.soft_cap : 0.0f;
  auto* granules = reinterpret_cast<GranuleColumns*>(params.workspace + 4);
  p.mask = Forward::Mask::of(shape, options, granules);
  p.heads = static_cast<int>(shape.N);
  p.group = static_cast<int>(shape.N / shape.K);
  const int section = heads_in_forward_section(4 * shape.S * shape.H);
  p.order = {
      .blocks = static_cast<int>(tile::ceil_div(shape.T, Forward::kWorkT)),
      .heads = static_cast<int>(shape.B * shape.N),
      .section = Forward::kLongestFirst ? tile::ceil_div(section, p.group) * p.group : 1,
  };
  p.tile_counter = params.workspace;
  if (Forward::kClusterBlocks == 1) {
    if (cudaError_t error = cudaMemsetAsync(p.tile_counter, 0, sizeof(int), stream)) return error;
  }
  if (cudaError_t error = launch_ranges(p.mask, shape.B, granules, false, stream)) return error;
  const int clusters = std::min(p.order.count(), multiprocessors / Forward::kClusterBlocks);
  return launch(attention_fwd_sm90_kernel<Forward>, int64_t{clusters} * Forward::kClusterBlocks,
                Forward::kThreads, Forward::kSharedBytes, stream, p);
}

}  // namespace

template <class T, int kHeadDim, MaskKind kMask, bool kSoftCap>
cudaError_t launch_forward(const AttentionFwdParams& params, cudaStream_t stream) {
  if constexpr (kHeadDim == 256 && kMask == MaskKind::kFull) {
    using Paired = AttentionForward<T, kHeadDim, kMask, kSoftCap, 2>;
    const auto tiles = tile::ceil_div(params.shape.T, Paired::kBlockT);
    if (tiles % 2 == 0 || tiles > 16) return run_forward<Paired>(params, stream);  // few stay idle
  }
  return run_forward<AttentionForward<T, kHeadDim, kMask, kSoftCap, 1>>(params, stream);
}

#define JAXKERN_INSTANCE(kMask, kSoftCap)                                                       \
  template cudaError_t launch_forward<tile::JAXKERN_ELEMENT, JAXKERN_HEAD_DIM, MaskKind::kMask, \
                                      kSoftCap>(const AttentionFwdParams&, cudaStream_t)
JAXKERN_INSTANCE(kFull, false);
JAXKERN_INSTANCE(kCausal, false);
JAXKERN_INSTANCE(kBand, false);
JAXKERN_INSTANCE(kBand, true);
#undef JAXKERN_INSTANCE

}  // namespace jaxkern

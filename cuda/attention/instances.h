// The kernels' instances, each translation unit those of one element type and head dim.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/attention/mask.cuh"
#include "cuda/attention/params.h"

namespace jaxkern {

template <class T, int kHeadDim, MaskKind kMask, bool kSoftCap>
cudaError_t launch_forward(const AttentionFwdParams& params, cudaStream_t stream);

template <class T, int kHeadDim, MaskKind kMask, bool kSoftCap>
cudaError_t launch_backward(const AttentionBwdParams& params, cudaStream_t stream);

// Calls launch(mask kind, whether there is a soft cap) with the constants of the instance that the
// options need. With a soft cap the mask is always the general one.
template <class Launch>
cudaError_t select_mask(const AttentionOptions& options, const Launch& launch) {
  constexpr std::integral_constant<MaskKind, MaskKind::kFull> kFull;
  constexpr std::integral_constant<MaskKind, MaskKind::kCausal> kCausal;
  constexpr std::integral_constant<MaskKind, MaskKind::kBand> kBand;
  if (options.soft_cap > 0) return launch(kBand, std::true_type{});
  if (options.left < kAttentionUnbounded || options.query_lengths != nullptr ||
      options.query_segments != nullptr) {
    return launch(kBand, std::false_type{});
  }
  return options.right < kAttentionUnbounded ? launch(kCausal, std::false_type{})
                                             : launch(kFull, std::false_type{});
}

}  // namespace jaxkern

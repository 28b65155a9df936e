#include "cuda/attention/instances.h"
#include "cuda/attention/launch.h"
#include "cuda/tile/types.cuh"

namespace jaxkern {
namespace {

// Calls launch(T{}, head dim, causal) with the instance that `params` needs.
template <class Params, class Launch>
cudaError_t select_instance(const Params& params, const Launch& launch) {
  const auto with_mask = [&](auto element, auto head_dim) {
    return params.is_causal ? launch(element, head_dim, std::true_type{})
                            : launch(element, head_dim, std::false_type{});
  };
  const auto with_head_dim = [&](auto element) {
    switch (params.shape.H) {
      case 64:
        return with_mask(element, std::integral_constant<int, 64>{});
      case 128:
        return with_mask(element, std::integral_constant<int, 128>{});
      case 256:
        return with_mask(element, std::integral_constant<int, 256>{});
      default:
        return cudaErrorInvalidValue;
    }
  };
  switch (params.dtype) {
    case DType::kBFloat16:
      return with_head_dim(tile::bf16{});
    case DType::kFloat16:
      return with_head_dim(tile::f16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_attention_fwd(const AttentionFwdParams& params, cudaStream_t stream) {
  return select_instance(params, [&](auto element, auto head_dim, auto causal) {
    if constexpr (head_dim > 128) {
      return cudaErrorInvalidValue;  // the forward has no such instance
    } else {
      return launch_forward<decltype(element), head_dim, causal>(params, stream);
    }
  });
}

cudaError_t launch_attention_bwd(const AttentionBwdParams& params, cudaStream_t stream) {
  return select_instance(params, [&](auto element, auto head_dim, auto causal) {
    return launch_backward<decltype(element), head_dim, causal>(params, stream);
  });
}

}  // namespace jaxkern

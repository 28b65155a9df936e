#include "cuda/quantize/launch.h"
#include "cuda/quantize/quantize_permuted.h"

namespace jaxkern {

cudaError_t launch_quantize_permuted(const QuantizePermutedParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return quantize::launch_permuted<float>(p, stream);
    case DType::kBFloat16:
      return quantize::launch_permuted<tile::bf16>(p, stream);
    case DType::kFloat16:
      return quantize::launch_permuted<tile::f16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jaxkern

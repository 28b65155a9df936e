// Instances of quantisation to four bits.
#include "cuda/quantize/quantize_four_bit.h"

#include "cuda/quantize/launch.h"

namespace jaxkern {

cudaError_t launch_quantize_four_bit(const QuantizeFourBitParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return quantize::launch_four_bit<float>(p, stream);
    case DType::kBFloat16:
      return quantize::launch_four_bit<tile::bf16>(p, stream);
    case DType::kFloat16:
      return quantize::launch_four_bit<tile::f16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_row_amax(const RowAmaxParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return quantize::launch_row_amax<float>(p, stream);
    case DType::kBFloat16:
      return quantize::launch_row_amax<tile::bf16>(p, stream);
    case DType::kFloat16:
      return quantize::launch_row_amax<tile::f16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jaxkern

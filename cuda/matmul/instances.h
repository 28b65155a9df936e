// The instances of the product of scaled matrices, each translation unit those of one pair of
// element types or, for few rows of lhs, of one number of them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/matmul/four_bit.h"
#include "cuda/matmul/params.h"
#include "cuda/tile/types.cuh"

namespace jaxkern {

// Calls launch<Out>() with the element type of the result.
template <class Launch>
cudaError_t select_out(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch.template operator()<tile::bf16>();
    case DType::kFloat16:
      return launch.template operator()<tile::f16>();
    case DType::kFloat32:
      return launch.template operator()<float>();
    default:
      return cudaErrorInvalidValue;
  }
}

// All that launch_scaled_matmul() has found to be supported.
template <class Lhs, class Rhs>
cudaError_t launch_scaled_matmul_of(const ScaledMatmulParams& params, cudaStream_t stream);

// e4m3 by e4m3, at most kTokens rows of lhs, rhs not kBlock1x128.
template <int kTokens>
cudaError_t launch_scaled_matmul_few_rows(const ScaledMatmulParams& params, cudaStream_t stream);

// Weights of the format; the result is of x's type or float32.
template <FourBitFormat kFormat>
cudaError_t launch_quantized_matmul_of(const QuantizedMatmulParams& params, cudaStream_t stream);
template <FourBitFormat kFormat>
cudaError_t launch_quantized_matmul_grad_of(const QuantizedMatmulParams& params,
                                            cudaStream_t stream);
template <FourBitFormat kFormat>
cudaError_t launch_weight_to_fp8_of(const WeightToFp8Params& params, cudaStream_t stream);

}  // namespace jaxkern

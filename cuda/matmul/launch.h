// Matmul launchers. They enqueue on `stream` and neither allocate nor synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/matmul/four_bit.h"
#include "cuda/matmul/params.h"

namespace jaxkern {

cudaError_t launch_scaled_matmul(const ScaledMatmulParams& params, cudaStream_t stream);
cudaError_t launch_quantized_matmul(const QuantizedMatmulParams& params, cudaStream_t stream);
cudaError_t launch_quantized_matmul_grad(const QuantizedMatmulParams& params, cudaStream_t stream);
cudaError_t launch_weight_to_fp8(const WeightToFp8Params& params, cudaStream_t stream);

}  // namespace jaxkern

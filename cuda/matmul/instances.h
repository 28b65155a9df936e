// The instances of the product of scaled matrices, each translation unit those of one pair of
// element types.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/matmul/params.h"

namespace jaxkern {

template <class Lhs, class Rhs>
cudaError_t launch_scaled_matmul_of(const ScaledMatmulParams& params, cudaStream_t stream);

}  // namespace jaxkern

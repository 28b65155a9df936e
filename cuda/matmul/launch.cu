#include "cuda/matmul/launch.h"

#include "cuda/matmul/instances.h"
#include "cuda/tile/types.cuh"

namespace jaxkern {

cudaError_t launch_scaled_matmul(const ScaledMatmulParams& params, cudaStream_t stream) {
  using tile::e4m3, tile::e5m2;
  const bool lhs_e5m2 = params.lhs_dtype == DType::kFloat8E5M2;
  const bool rhs_e5m2 = params.rhs_dtype == DType::kFloat8E5M2;
  if (lhs_e5m2 && rhs_e5m2) return launch_scaled_matmul_of<e5m2, e5m2>(params, stream);
  if (lhs_e5m2) return launch_scaled_matmul_of<e5m2, e4m3>(params, stream);
  if (rhs_e5m2) return launch_scaled_matmul_of<e4m3, e5m2>(params, stream);
  return launch_scaled_matmul_of<e4m3, e4m3>(params, stream);
}

}  // namespace jaxkern

#pragma once

#include <cuda_runtime_api.h>

#include "cuda/norm/params.h"

namespace jaxkern {

cudaError_t launch_rms_norm_fwd(const RmsNormFwdParams& params, cudaStream_t stream);
cudaError_t launch_rms_norm_bwd(const RmsNormBwdParams& params, cudaStream_t stream);

}  // namespace jaxkern

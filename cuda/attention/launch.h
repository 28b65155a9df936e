// Attention launchers. They enqueue on `stream` and neither allocate nor synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/params.h"

namespace jaxkern {

cudaError_t launch_attention_fwd(const AttentionFwdParams& params, cudaStream_t stream);
cudaError_t launch_attention_bwd(const AttentionBwdParams& params, cudaStream_t stream);

}  // namespace jaxkern

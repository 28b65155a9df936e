// The kernels' instances, each compiled in a translation unit of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/params.h"

namespace jaxkern {

template <class T, int kHeadDim, bool kCausal>
cudaError_t launch_forward(const AttentionFwdParams& params, cudaStream_t stream);

template <class T, int kHeadDim, bool kCausal>
cudaError_t launch_backward(const AttentionBwdParams& params, cudaStream_t stream);

}  // namespace jaxkern

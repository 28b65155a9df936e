#pragma once

#include <cuda_runtime_api.h>

#include "cuda/decode/params.h"

namespace jaxkern::decode {

// Enqueues a step. An error if not all blocks can be on the GPU at once.
cudaError_t launch_decode_step(const DecodeParams& params, cudaStream_t stream);

// What the workspace must have, all bits set before the first step.
int64_t decode_workspace_bytes(const DecodeParams& params);

// The instances, by the type of weights and the elements of a head.
template <class Weight, int kHeadDim>
cudaError_t launch_decode_step_of(const DecodeParams& params, cudaStream_t stream);

}  // namespace jaxkern::decode

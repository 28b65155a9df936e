// Launches the expansion of weights of four bits to e4m3.
#pragma once

#include "cuda/host/launch.h"
#include "cuda/matmul/weight_to_fp8.cuh"

namespace jaxkern {

template <FourBitFormat kFormat>
cudaError_t launch_weight_to_fp8_of(const WeightToFp8Params& params, cudaStream_t stream) {
  return launch(weight_to_fp8_kernel<kFormat>, params.strips, kWeightToFp8Threads, 0, stream,
                params, params.w.tile_bytes());
}

}  // namespace jaxkern

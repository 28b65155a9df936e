// The instances of quantisation, each translation unit those of one source (sources.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/quantize/params.h"

namespace jaxkern::quantize {

struct Matrix;
struct Swiglu;
struct SwigluGrad;
struct RmsNorm;

template <class Source>
cudaError_t launch_source(const QuantizeParams& params, cudaStream_t stream);

}  // namespace jaxkern::quantize

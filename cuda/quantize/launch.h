#pragma once

#include <cuda_runtime_api.h>

#include "cuda/quantize/params.h"

namespace jaxkern {

cudaError_t launch_quantize(const QuantizeParams& params, cudaStream_t stream);
cudaError_t launch_quantize_four_bit(const QuantizeFourBitParams& params, cudaStream_t stream);
cudaError_t launch_row_amax(const RowAmaxParams& params, cudaStream_t stream);

}  // namespace jaxkern

#include "cuda/matmul/weight_to_fp8.h"

#include "cuda/matmul/instances.h"

namespace jaxkern {

template cudaError_t launch_weight_to_fp8_of<FourBitFormat::kNvfp4>(const WeightToFp8Params&,
                                                                    cudaStream_t);
template cudaError_t launch_weight_to_fp8_of<FourBitFormat::kMxfp4>(const WeightToFp8Params&,
                                                                    cudaStream_t);
template cudaError_t launch_weight_to_fp8_of<FourBitFormat::kInt4>(const WeightToFp8Params&,
                                                                   cudaStream_t);

}  // namespace jaxkern

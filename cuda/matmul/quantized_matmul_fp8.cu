// Instances of the product of e4m3 with weights of four bits: JAXKERN_FORMAT comes from the table
// in CMakeLists.txt.
#include "cuda/matmul/quantized_matmul_fp8.h"

#include "cuda/matmul/instances.h"

namespace jaxkern {

template <FourBitFormat kFormat>
cudaError_t launch_quantized_matmul_fp8_of(const QuantizedMatmulFp8Params& params,
                                           cudaStream_t stream) {
  return select_out(params.out_dtype, [&]<class Out>() {
    return launch_four_bit_fp8_of_sm90<kFormat, Out>(params, stream);
  });
}

template cudaError_t launch_quantized_matmul_fp8_of<FourBitFormat::JAXKERN_FORMAT>(
    const QuantizedMatmulFp8Params&, cudaStream_t);

}  // namespace jaxkern

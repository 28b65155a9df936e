// Instances of the product with weights of four bits for few rows of x: JAXKERN_FORMAT comes from
// the table in CMakeLists.txt.
#include "cuda/matmul/instances.h"
#include "cuda/matmul/quantized_matmul.h"

namespace jaxkern {

template <FourBitFormat kFormat>
cudaError_t launch_quantized_matmul_few_rows(const QuantizedMatmulParams& p, cudaStream_t stream) {
  const auto run = [&]<class T>() {
    if (p.M <= 8) {
      return launch_four_bit_few_rows_sm90<QuantizedMatmulFewRows<kFormat, T, 8>>(p, stream);
    }
    if (p.M <= 16) {
      return launch_four_bit_few_rows_sm90<QuantizedMatmulFewRows<kFormat, T, 16>>(p, stream);
    }
    return launch_four_bit_few_rows_sm90<QuantizedMatmulFewRows<kFormat, T, 32>>(p, stream);
  };
  return p.x_dtype == DType::kBFloat16 ? run.template operator()<tile::bf16>()
                                       : run.template operator()<tile::f16>();
}

template cudaError_t launch_quantized_matmul_few_rows<FourBitFormat::JAXKERN_FORMAT>(
    const QuantizedMatmulParams&, cudaStream_t);

}  // namespace jaxkern

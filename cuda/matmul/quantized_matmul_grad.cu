// Instances of the gradient of the product with weights of four bits: JAXKERN_FORMAT comes from the
// table in CMakeLists.txt.
#include "cuda/matmul/instances.h"
#include "cuda/matmul/quantized_matmul.h"

namespace jaxkern {

template <FourBitFormat kFormat>
cudaError_t launch_quantized_matmul_grad_of(const QuantizedMatmulParams& p, cudaStream_t stream) {
  const bool single = p.out_dtype == DType::kFloat32;
  const auto run = [&]<class T>() {
    return single ? launch_four_bit_grad_of_sm90<kFormat, T, float>(p, stream)
                  : launch_four_bit_grad_of_sm90<kFormat, T, T>(p, stream);
  };
  return p.x_dtype == DType::kBFloat16 ? run.template operator()<tile::bf16>()
                                       : run.template operator()<tile::f16>();
}

template cudaError_t launch_quantized_matmul_grad_of<FourBitFormat::JAXKERN_FORMAT>(
    const QuantizedMatmulParams&, cudaStream_t);

}  // namespace jaxkern

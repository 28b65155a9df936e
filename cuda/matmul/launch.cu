#include "cuda/matmul/launch.h"

#include "cuda/matmul/instances.h"
#include "cuda/tile/types.cuh"

namespace jaxkern {

namespace {

bool supported(const ScaledMatmulParams& p) {
  const bool lhs_blocks = p.lhs_scaling > Scaling::kRow, rhs_blocks = p.rhs_scaling > Scaling::kRow;
  if (!lhs_blocks && !rhs_blocks) return true;
  return p.lhs_scaling == Scaling::kBlock1x128 && rhs_blocks && !p.fast_accumulation;
}

}  // namespace

cudaError_t launch_scaled_matmul(const ScaledMatmulParams& params, cudaStream_t stream) {
  using tile::e4m3, tile::e5m2;
  if (!supported(params)) return cudaErrorInvalidValue;
  const bool lhs_e5m2 = params.lhs_dtype == DType::kFloat8E5M2;
  const bool rhs_e5m2 = params.rhs_dtype == DType::kFloat8E5M2;
  const bool few_rows_can = !lhs_e5m2 && !rhs_e5m2 && params.rhs_scaling != Scaling::kBlock1x128;
  if (few_rows_can) {
    if (params.M <= 16) return launch_scaled_matmul_few_rows<16>(params, stream);
    if (params.M <= 32) return launch_scaled_matmul_few_rows<32>(params, stream);
    if (params.M <= 64) return launch_scaled_matmul_few_rows<64>(params, stream);
    if (params.M <= 128) return launch_scaled_matmul_few_rows<128>(params, stream);
  }
  if (lhs_e5m2 && rhs_e5m2) return launch_scaled_matmul_of<e5m2, e5m2>(params, stream);
  if (lhs_e5m2) return launch_scaled_matmul_of<e5m2, e4m3>(params, stream);
  if (rhs_e5m2) return launch_scaled_matmul_of<e4m3, e5m2>(params, stream);
  return launch_scaled_matmul_of<e4m3, e4m3>(params, stream);
}

namespace {

// Calls launch<kFormat>().
template <class Launch>
cudaError_t select_format(FourBitFormat format, const Launch& launch) {
  switch (format) {
    case FourBitFormat::kNvfp4:
      return launch.template operator()<FourBitFormat::kNvfp4>();
    case FourBitFormat::kMxfp4:
      return launch.template operator()<FourBitFormat::kMxfp4>();
    case FourBitFormat::kInt4:
      return launch.template operator()<FourBitFormat::kInt4>();
  }
  return cudaErrorInvalidValue;
}

bool supported(const QuantizedMatmulParams& p) {
  return p.out_dtype == DType::kFloat32 || p.out_dtype == p.x_dtype;
}

}  // namespace

cudaError_t launch_quantized_matmul(const QuantizedMatmulParams& params, cudaStream_t stream) {
  if (!supported(params)) return cudaErrorInvalidValue;
  return select_format(params.w.format, [&]<FourBitFormat kFormat>() {
    return launch_quantized_matmul_of<kFormat>(params, stream);
  });
}

cudaError_t launch_quantized_matmul_grad(const QuantizedMatmulParams& params, cudaStream_t stream) {
  if (!supported(params)) return cudaErrorInvalidValue;
  return select_format(params.w.format, [&]<FourBitFormat kFormat>() {
    return launch_quantized_matmul_grad_of<kFormat>(params, stream);
  });
}

cudaError_t launch_weight_to_fp8(const WeightToFp8Params& params, cudaStream_t stream) {
  return select_format(params.w.format, [&]<FourBitFormat kFormat>() {
    return launch_weight_to_fp8_of<kFormat>(params, stream);
  });
}

}  // namespace jaxkern

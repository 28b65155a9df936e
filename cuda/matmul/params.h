// What the matmul launchers take: plain pointers and sizes.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/scaling.h"

namespace jaxkern {

// out = (lhs * lhs_scale) (rhs * rhs_scale)^T + bias, for each of B matrices. All row-major,
// contiguous and 16-byte aligned; K is a multiple of 16, N of 8, and no size is zero.
// Scales are as in scaling.h, those of B matrices one after another.
// Supported: kTensor and kRow in any mix; lhs kBlock1x128 with rhs kBlock1x128 or kBlock128x128.
struct ScaledMatmulParams {
  DType lhs_dtype, rhs_dtype;  // kFloat8E4M3 or kFloat8E5M2
  DType out_dtype;             // kBFloat16, kFloat16 or kFloat32
  Scaling lhs_scaling, rhs_scaling;
  bool fast_accumulation;  // by the tensor cores alone; without blocks only
  int64_t B, M, N, K;
  const void* lhs;         // (B, M, K)
  const void* rhs;         // (B, N, K)
  const float* lhs_scale;  // (B, ...)
  const float* rhs_scale;  // (B, ...)
  const float* bias;       // (N) or null
  void* out;               // (B, M, N)
};

}  // namespace jaxkern

// What the matmul launchers take: plain pointers and sizes.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

// Which elements of a (rows, K) matrix share a scale: all, those of a row, or blocks of a row or of
// 128 rows that have 128 columns.
enum class Scaling : int32_t { kTensor, kRow, kBlock1x128, kBlock128x128 };

constexpr int kScaleBlock = 128;

// Rows of 1x128 scales are padded to 16 bytes, as TMA wants them.
constexpr int64_t padded_scale_row(int64_t rows) { return (rows + 3) / 4 * 4; }

// out = (lhs * lhs_scale) (rhs * rhs_scale)^T + bias, for each of B matrices. All row-major,
// contiguous and 16-byte aligned; K is a multiple of 16, N of 8, and no size is zero.
//
// Shapes of scales by Scaling, of R = M or N rows and KB = ceil(K / 128):
//   kTensor (B), kRow (B, R), kBlock1x128 (B, KB, padded_scale_row(R)),
//   kBlock128x128 (B, ceil(R / 128), KB)
// Supported: kTensor and kRow in any mix; lhs kBlock1x128 with rhs kBlock1x128 or kBlock128x128.
struct ScaledMatmulParams {
  DType lhs_dtype, rhs_dtype;  // kFloat8E4M3 or kFloat8E5M2
  DType out_dtype;             // kBFloat16, kFloat16 or kFloat32
  Scaling lhs_scaling, rhs_scaling;
  bool fast_accumulation;  // by the tensor cores alone; without blocks only
  int64_t B, M, N, K;
  const void* lhs;         // (B, M, K)
  const void* rhs;         // (B, N, K)
  const float* lhs_scale;  // see above
  const float* rhs_scale;  // see above
  const float* bias;       // (N) or null
  void* out;               // (B, M, N)
};

}  // namespace jaxkern

// Arguments of the norm kernels. R rows, W width; everything is row-major.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

// Rows of the workspace of rms_norm_bwd, and so the most blocks that it may launch.
inline constexpr int kRmsNormMaxPartials = 256;

struct RmsNormFwdParams {
  const void* x;      // [R, W] dtype
  const void* scale;  // [W] scale_dtype
  void* y;            // [R, W] dtype
  float* rstd;        // [R]
  int64_t rows;
  int64_t width;
  float epsilon;
  DType dtype;
  DType scale_dtype;  // kFloat32 or dtype
};

struct RmsNormBwdParams {
  const void* x;          // [R, W] dtype
  const void* scale;      // [W] scale_dtype
  const float* rstd;      // [R]
  const void* dy;         // [R, W] dtype
  void* dx;               // [R, W] dtype
  float* dscale;          // [W]
  float* dscale_partial;  // [kRmsNormMaxPartials, W]
  int64_t rows;
  int64_t width;
  DType dtype;
  DType scale_dtype;  // kFloat32 or dtype
};

}  // namespace jaxkern

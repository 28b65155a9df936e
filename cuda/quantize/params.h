// Arguments of quantisation to 8-bit floats. R rows, C columns; everything is row-major.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/scaling.h"

namespace jaxkern {

// Both orientations are optional: without one its pointers are null. values_t and scale_t are what
// values and scale would be for the transpose of x. For kTensor the caller has the scale already.
struct QuantizeParams {
  const void* x;          // [R, C] dtype
  const float* scale_in;  // [1]; read for kTensor alone
  void* values;           // [R, C] format
  float* scale;           // of x, as in scaling.h; null for kTensor
  void* values_t;         // [C, R] format
  float* scale_t;         // of its transpose; null for kTensor
  int32_t* workspace;     // [R + C]; used for kRow with values_t alone
  int64_t rows;           // at least 1
  int64_t cols;           // at least 1
  DType dtype;            // kFloat32, kBFloat16 or kFloat16
  DType format;           // kFloat8E4M3 or kFloat8E5M2
  Scaling scaling;
};

}  // namespace jaxkern

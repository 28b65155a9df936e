// Arguments of quantisation to 8-bit floats. R rows, C columns; everything is row-major.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

inline constexpr int kQuantizeBlock = 128;

// The groups of elements that share a scale. The numbers are those of the attribute of the call.
enum class Scaling : int32_t {
  kTensor,        // all; the caller has the scale already
  kRow,           // each row
  kBlock1x128,    // kQuantizeBlock neighbours in a row
  kBlock128x128,  // kQuantizeBlock of those rows
};

// Both orientations are optional: without one its pointers are null. values_t and scale_t are what
// values and scale would be for the transpose of x. Rc = ceil(R / 128), Cc = ceil(C / 128), and R4,
// C4 are R, C rounded up to multiples of 4, which copies by TMA ask for; what lies between is
// unspecified.
//
//   scaling   kTensor  kRow   kBlock1x128   kBlock128x128
//   scale     null     [R]    [Cc, R4]      [Rc, Cc]
//   scale_t   null     [C]    [Rc, C4]      [Cc, Rc]
struct QuantizeParams {
  const void* x;          // [R, C] dtype
  const float* scale_in;  // [1]; read for kTensor alone
  void* values;           // [R, C] format
  float* scale;           // as above
  void* values_t;         // [C, R] format
  float* scale_t;         // as above
  int32_t* workspace;     // [R + C]; used for kRow with values_t alone
  int64_t rows;           // at least 1
  int64_t cols;           // at least 1
  DType dtype;            // kFloat32, kBFloat16 or kFloat16
  DType format;           // kFloat8E4M3 or kFloat8E5M2
  Scaling scaling;
};

}  // namespace jaxkern

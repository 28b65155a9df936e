// Arguments of quantisation to 8-bit floats and to four bits. R rows, C columns; everything is
// row-major.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"
#include "cuda/scaling.h"

namespace jaxkern {

// One quantised matrix. Both orientations are optional: without one its pointers are null. values_t
// and scale_t are what values and scale would be for the transpose.
struct QuantizedMatrix {
  void* values;        // [R, C] format
  float* scale;        // as in scaling.h; null for kTensor
  void* values_t;      // [C, R] format
  float* scale_t;      // of the transpose; null for kTensor
  int32_t* workspace;  // [quantize_workspace(scaling, has values, has values_t, R, C)]
};

// What is quantised, computed in float32 from the inputs and rounded to their dtype.
enum class QuantizeSource : uint8_t {
  kMatrix,      // x
  kSwiglu,      // silu(gate) * up
  kSwigluGrad,  // of gate, up and the gradient of the above: the gradients of gate and of up
  kRmsNorm,     // x * rstd * weight
};

// Words by which blocks know how far others are: the next turn, and a count for each 128 rows.
constexpr int64_t quantize_progress(int64_t R) { return 1 + scale_blocks(R); }

// Words of the largest magnitudes of columns, then of rows.
constexpr int64_t quantize_workspace(Scaling scaling, bool has_natural, bool has_transposed,
                                     int64_t R, int64_t C) {
  if (scaling != Scaling::kRow || !has_transposed) return 0;
  return C + (has_natural ? R : 0);
}

// Whether rstd, where it is computed, is so while others quantise (turns.cuh).
constexpr bool computes_rstd_ahead(Scaling scaling, bool has_transposed) {
  return scaling == Scaling::kBlock128x128 || (scaling == Scaling::kBlock1x128 && has_transposed);
}

struct QuantizeParams {
  const void* inputs[3];       // [R, C] dtype, in the order above
  const float* scale_in;       // [1]; read for kTensor alone
  const float* weight;         // [C]; this and the next three are those of kRmsNorm
  const float* rstd_in;        // [R]; null to have it computed
  float* rstd;                 // [R] 1 / sqrt(mean(x^2) + epsilon); written where rstd_in is null
  int32_t* progress;           // [quantize_progress(R)]; where rstd is, but for rows and columns
  QuantizedMatrix outputs[2];  // in the order above, all in the same orientations
  int64_t rows;                // at least 1
  int64_t cols;                // at least 1
  float epsilon;               // of rstd
  int32_t lead;                // set by the launcher: how many panels units are ahead (turns.cuh)
  DType dtype;                 // kFloat32, kBFloat16 or kFloat16
  DType format;                // kFloat8E4M3 or kFloat8E5M2
  Scaling scaling;             // kTensor for kMatrix alone
  QuantizeSource source;
};

// The largest magnitude of each row, of those blocks of 16 that are finite.
struct RowAmaxParams {
  const void* x;  // [R, C] dtype; C is a multiple of 16, the array aligned to 16 bytes
  float* amax;    // [R]
  int64_t rows;   // at least 1
  int64_t cols;   // at least 16
  DType dtype;    // kFloat32, kBFloat16 or kFloat16
};

// Of M matrices. No block crosses the end of a row, so that rows need not be told apart.
struct QuantizeFourBitParams {
  const void* x;              // [M, size] dtype; aligned to 16 bytes
  const float* tensor_scale;  // [M], of kNvfp4
  void* values;               // [M, size], two in a byte, the first in its lower half
  void* scale;                // [M, size / block] e4m3, e8m0 or bfloat16
  void* zero_point;           // [M, size / block] as values, of kInt4; or null: zero is zero
  int64_t matrices;           // at least 1; 1 with zero_point
  int64_t size;               // elements of a matrix: a multiple of the block, at least one
  int32_t block;              // 16 of kNvfp4, 32 of kMxfp4; 32, 64 or 128 of kInt4
  DType dtype;                // kFloat32, kBFloat16 or kFloat16
  FourBitFormat format;
  int32_t blocks;  // set by the launcher: of threads, of a matrix
};

}  // namespace jaxkern

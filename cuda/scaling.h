// Scales of 8-bit matrices: which elements share one, and how scales lie in memory.
//
// Shapes of a matrix [R, C]:
//   kTensor        [1]
//   kRow           [R]
//   kBlock1x128    [scale_blocks(C), padded_scale_row(R)]
//   kBlock128x128  [scale_blocks(R), scale_blocks(C)]
#pragma once

#include <cstdint>

namespace jaxkern {

// The groups of elements that share a scale. The numbers are those of the attributes of calls.
enum class Scaling : int32_t {
  kTensor,        // all
  kRow,           // each row
  kBlock1x128,    // kScaleBlock neighbours in a row
  kBlock128x128,  // kScaleBlock of those rows
};

constexpr int kScaleBlock = 128;

// Of an axis; the last one may be shorter.
constexpr int64_t scale_blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// Rows of 1x128 scales begin at multiples of 16 bytes, as TMA wants them. What lies beyond R is
// unspecified.
constexpr int64_t padded_scale_row(int64_t R) { return (R + 3) / 4 * 4; }

}  // namespace jaxkern

// The element types that a launcher chooses between.
#pragma once

#include <cstdint>

namespace jaxkern {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// Values of four bits and the scales of their blocks. The numbers are those of attributes of calls.
enum class FourBitFormat : int32_t {
  kNvfp4,  // e2m1, e4m3 for 16, and a float32 of the matrix
  kMxfp4,  // e2m1, e8m0 for 32
  kInt4,   // integers, bfloat16 for a group
};

}  // namespace jaxkern

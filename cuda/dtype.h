// The element types that a launcher chooses between.
#pragma once

#include <cstdint>

namespace jaxkern {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

}  // namespace jaxkern

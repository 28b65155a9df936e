// The element types that a launcher chooses between.
#pragma once

#include <cstdint>

namespace jaxkern {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace jaxkern

// Element types as tensor maps know them.
#pragma once

#include <type_traits>

#include "cuda/host/tensor_map.h"
#include "cuda/tile/types.cuh"

namespace jaxkern {

template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  if (std::is_same_v<T, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (std::is_same_v<T, tile::bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (std::is_same_v<T, tile::f16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static_assert(sizeof(T) != 1, "8-bit types are UINT8 to TMA");
}

}  // namespace jaxkern

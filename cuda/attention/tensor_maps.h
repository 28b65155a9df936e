// Tensor maps of the attention operands.
#pragma once

#include "cuda/attention/params.h"
#include "cuda/host/tensor_map.h"

namespace jaxkern {

inline CUtensorMapDataType tensor_map_dtype(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// A (B, T, N, H) operand, read or written in boxes of `box_rows` queries.
inline cudaError_t make_query_map(CUtensorMap* map, DType dtype, const AttentionShape& shape,
                                  const void* data, int box_rows) {
  return make_tensor_map(map, tensor_map_dtype(dtype), data, shape.B, shape.T, shape.N, shape.H,
                         box_rows);
}

// A (B, S, K, H) operand, read or written in boxes of `box_rows` keys.
inline cudaError_t make_key_map(CUtensorMap* map, DType dtype, const AttentionShape& shape,
                                const void* data, int box_rows) {
  return make_tensor_map(map, tensor_map_dtype(dtype), data, shape.B, shape.S, shape.K, shape.H,
                         box_rows);
}

}  // namespace jaxkern

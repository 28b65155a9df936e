#include "cuda/host/tensor_map.h"

#include <cudaTypedefs.h>

namespace jaxkern {
namespace {

constexpr int kPanelBytes = 128;

constexpr cuuint64_t element_bytes(CUtensorMapDataType dtype) {
  switch (dtype) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    default:
      return 2;
  }
}

constexpr cuuint32_t panel_cols(CUtensorMapDataType dtype) {
  return static_cast<cuuint32_t>(kPanelBytes / element_bytes(dtype));
}

using EncodeTiled = PFN_cuTensorMapEncodeTiled_v12000;

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &found);
    const bool ok = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
  }();
  return function;
}

cudaError_t encode_map(CUtensorMap* map, CUtensorMapDataType dtype, int rank, const void* data,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       CUtensorMapSwizzle swizzle) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult status =
      encode(map, dtype, rank, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                            int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
                            int box_rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(batch)};
  const cuuint64_t row = sizes[0] * element_bytes(dtype);
  const cuuint64_t strides[3] = {row, row * sizes[1], row * sizes[1] * sizes[2]};
  const cuuint32_t box[4] = {panel_cols(dtype), 1, static_cast<cuuint32_t>(box_rows), 1};
  return encode_map(map, dtype, 4, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

cudaError_t make_matrix_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                            int64_t rows, int64_t cols, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {sizes[0] * element_bytes(dtype)};
  const cuuint32_t box[2] = {panel_cols(dtype), static_cast<cuuint32_t>(box_rows)};
  return encode_map(map, dtype, 2, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

cudaError_t make_panel_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                           int64_t rows, int64_t cols, int box_rows, int* box_panels) {
  const cuuint64_t bytes = static_cast<cuuint64_t>(cols) * element_bytes(dtype);
  if (bytes % kPanelBytes != 0) *box_panels = 1;
  const cuuint64_t panels = *box_panels > 1 ? bytes / kPanelBytes : 1;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(cols) / panels,
                               static_cast<cuuint64_t>(rows), panels};
  const cuuint64_t strides[2] = {bytes, kPanelBytes};
  const cuuint32_t box[3] = {panel_cols(dtype), static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(*box_panels)};
  return encode_map(map, dtype, 3, data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

cudaError_t make_block_map(CUtensorMap* map, const void* data, int64_t rows, int64_t cols,
                           int block_bytes, int box_rows, int box_cols) {
  const cuuint32_t words = static_cast<cuuint32_t>(block_bytes) / sizeof(uint64_t);
  const cuuint64_t sizes[3] = {words, static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t block = words * sizeof(uint64_t);
  const cuuint64_t strides[2] = {block, block * sizes[1]};
  const cuuint32_t box[3] = {words, static_cast<cuuint32_t>(box_cols),
                             static_cast<cuuint32_t>(box_rows)};
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 3, data, sizes, strides, box,
                    CU_TENSOR_MAP_SWIZZLE_NONE);
}

cudaError_t make_batched_block_map(CUtensorMap* map, const void* data, int64_t batch, int64_t rows,
                                   int64_t cols, int block_bytes, int box_rows, int box_cols) {
  const cuuint32_t words = static_cast<cuuint32_t>(block_bytes) / sizeof(uint64_t);
  const cuuint64_t sizes[4] = {words, static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(batch)};
  const cuuint64_t block = words * sizeof(uint64_t);
  const cuuint64_t strides[3] = {block, block * sizes[1], block * sizes[1] * sizes[2]};
  const cuuint32_t box[4] = {words, static_cast<cuuint32_t>(box_cols),
                             static_cast<cuuint32_t>(box_rows), 1};
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 4, data, sizes, strides, box,
                    CU_TENSOR_MAP_SWIZZLE_NONE);
}

cudaError_t make_row_map(CUtensorMap* map, const float* data, int64_t rows, int64_t cols,
                         int box_cols) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {sizes[0] * sizeof(float)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), 1};
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, data, sizes, strides, box,
                    CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace jaxkern

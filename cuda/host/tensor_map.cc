#include "cuda/host/tensor_map.h"

#include <cudaTypedefs.h>

namespace jaxkern {
namespace {

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

}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                            int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
                            int box_rows) {
  constexpr int kPanelCols = 64;
  constexpr uint64_t kElementBytes = 2;
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {sizes[0] * kElementBytes, sizes[0] * sizes[1] * kElementBytes,
                                 sizes[0] * sizes[1] * sizes[2] * kElementBytes};
  const cuuint32_t box[4] = {kPanelCols, 1, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult status =
      encode(map, dtype, 4, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jaxkern

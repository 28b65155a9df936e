// Tensor maps for tile/tma.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxkern {

// Describes a contiguous (batch, rows, heads, head_dim) tensor and the box that one copy moves:
// `box_rows` rows of one head, 128 bytes of columns, 128-byte swizzled. A row of a head takes a
// multiple of 16 bytes. 8-bit floating-point types are described as UINT8. Uses the driver through
// the runtime, so that nothing links against libcuda.
cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                            int64_t batch, int64_t rows, int64_t heads, int64_t head_dim,
                            int box_rows);

// Describes a contiguous (rows, cols) matrix and a box of `box_rows` rows, 128 bytes of columns,
// 128-byte swizzled. A row takes a multiple of 16 bytes.
cudaError_t make_matrix_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                            int64_t rows, int64_t cols, int box_rows);

// The same, for copies of several boxes side by side: `*box_panels` of them, one after another in
// memory, whose coordinates are (0, row, panel); or, where no whole number of panels makes a row,
// just one of them, at (col, row, 0), and `*box_panels` becomes 1.
cudaError_t make_panel_map(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                           int64_t rows, int64_t cols, int box_rows, int* box_panels);

// Describes contiguous (rows, cols) blocks of `block_bytes` each, a multiple of 16 up to 2,048, and
// a box of `box_rows` by `box_cols` of them, whose coordinates are (0, col, row). No swizzle.
cudaError_t make_block_map(CUtensorMap* map, const void* data, int64_t rows, int64_t cols,
                           int block_bytes, int box_rows, int box_cols);

// The same of (batch, rows, cols) blocks, whose boxes do not reach into the next matrix. Their
// coordinates are (0, col, row, batch).
cudaError_t make_batched_block_map(CUtensorMap* map, const void* data, int64_t batch, int64_t rows,
                                   int64_t cols, int block_bytes, int box_rows, int box_cols);

// Describes a contiguous (rows, cols) float32 tensor and a box of `box_cols` of one row. cols is a
// multiple of 4.
cudaError_t make_row_map(CUtensorMap* map, const float* data, int64_t rows, int64_t cols,
                         int box_cols);

}  // namespace jaxkern

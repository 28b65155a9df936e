// Register tiles: 64 rows held by the 128 threads of a warpgroup, in wgmma's fragment layout.
//
// Thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds, for each block j of eight
// columns, rows 16 w + l / 4 + {0, 8} and columns 8 j + 2 (l % 4) + {0, 1}:
//   float:  data[4 j + 2 i + c]  is row + 8 i, column + c
//   16-bit: data[2 j + i]        is row + 8 i, both columns packed
// so a 16-bit tile is, register for register, the A operand of wgmma.
#pragma once

#include "cuda/tile/types.cuh"

namespace jaxkern::tile {

template <class T, int kRows_, int kCols_>
struct RegisterTile {
  static_assert(kRows_ == 64, "a warpgroup holds 64 rows");
  static_assert(kCols_ % 16 == 0, "columns come in pairs of 8-wide blocks");
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  uint32_t data[kCols / 4];
};

template <int kRows_, int kCols_>
struct RegisterTile<float, kRows_, kCols_> {
  static_assert(kRows_ == 64, "a warpgroup holds 64 rows");
  static_assert(kCols_ % 16 == 0, "columns come in pairs of 8-wide blocks");
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  float data[kCols / 2];

  __device__ __forceinline__ float& at(int block, int row_half, int pair) {
    return data[4 * block + 2 * row_half + pair];
  }
  __device__ __forceinline__ const float& at(int block, int row_half, int pair) const {
    return data[4 * block + 2 * row_half + pair];
  }
};

// The two neighbouring elements of a block of eight columns and a half of the rows.
template <int kCols>
__device__ __forceinline__ float2 pair(const RegisterTile<float, 64, kCols>& x, int block,
                                       int row_half) {
  return make_float2(x.at(block, row_half, 0), x.at(block, row_half, 1));
}
template <class T, int kCols>
__device__ __forceinline__ float2 pair(const RegisterTile<T, 64, kCols>& x, int block,
                                       int row_half) {
  return unpack<T>(x.data[2 * block + row_half]);
}

// A float32 for each of the two rows a thread holds; the four threads of a row hold the same.
struct RowVector {
  float data[2];
  __device__ __forceinline__ float& operator[](int row_half) { return data[row_half]; }
  __device__ __forceinline__ float operator[](int row_half) const { return data[row_half]; }
};

// Where this thread's elements lie in a 64-row tile.
__device__ __forceinline__ int fragment_row(int row_half) {
  const int t = threadIdx.x % kWarpgroupSize;
  return 16 * (t / kWarpSize) + (t % kWarpSize) / 4 + 8 * row_half;
}
__device__ __forceinline__ int fragment_col(int block) { return 8 * block + 2 * (threadIdx.x % 4); }

template <int kCols>
__device__ __forceinline__ void zero(RegisterTile<float, 64, kCols>& x) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) x.data[i] = 0.0f;
}

// Rounds to T.
template <class T, int kCols>
__device__ __forceinline__ void convert(RegisterTile<T, 64, kCols>& y,
                                        const RegisterTile<float, 64, kCols>& x) {
#pragma unroll
  for (int i = 0; i < kCols / 4; ++i) y.data[i] = pack<T>(x.data[2 * i], x.data[2 * i + 1]);
}

// Rounds the columns of x from `col` on, a multiple of 8, as many as y has.
template <class T, int kCols, int kColsX>
__device__ __forceinline__ void convert(RegisterTile<T, 64, kCols>& y,
                                        const RegisterTile<float, 64, kColsX>& x, int col) {
#pragma unroll
  for (int i = 0; i < kCols / 4; ++i) {
    const float* from = x.data + col / 2 + 2 * i;
    y.data[i] = pack<T>(from[0], from[1]);
  }
}

// The same in float32.
template <int kCols, int kColsX>
__device__ __forceinline__ void convert(RegisterTile<float, 64, kCols>& y,
                                        const RegisterTile<float, 64, kColsX>& x, int col) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) y.data[i] = x.data[col / 2 + i];
}

// y(r, c) = x(r, c) * rows(r)
template <int kCols>
__device__ __forceinline__ void scale_rows(RegisterTile<float, 64, kCols>& x,
                                           const RowVector& rows) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x.at(j, i, 0) *= rows[i];
      x.at(j, i, 1) *= rows[i];
    }
  }
}

// y(r, c) += x(r, c) * rows(r)
template <int kCols>
__device__ __forceinline__ void add_scaled(RegisterTile<float, 64, kCols>& y,
                                           const RegisterTile<float, 64, kCols>& x,
                                           const RowVector& rows) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y.at(j, i, 0) += x.at(j, i, 0) * rows[i];
      y.at(j, i, 1) += x.at(j, i, 1) * rows[i];
    }
  }
}

// y(r, c) += x(r, c) * rows(r) * row[c], the latter in memory
template <int kCols>
__device__ __forceinline__ void add_scaled(RegisterTile<float, 64, kCols>& y,
                                           const RegisterTile<float, 64, kCols>& x,
                                           const RowVector& rows, const float* row) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 cols = *reinterpret_cast<const float2*>(row + fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y.at(j, i, 0) += x.at(j, i, 0) * (rows[i] * cols.x);
      y.at(j, i, 1) += x.at(j, i, 1) * (rows[i] * cols.y);
    }
  }
}

template <int kCols>
__device__ __forceinline__ void add(RegisterTile<float, 64, kCols>& y,
                                    const RegisterTile<float, 64, kCols>& x) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) y.data[i] += x.data[i];
}

// x(r, c) += row[c], in memory
template <int kCols>
__device__ __forceinline__ void add_row(RegisterTile<float, 64, kCols>& x, const float* row) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 y = *reinterpret_cast<const float2*>(row + fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x.at(j, i, 0) += y.x;
      x.at(j, i, 1) += y.y;
    }
  }
}

// x(r, c) = x(r, c) * scale[c] + y[c], both in memory
template <int kCols>
__device__ __forceinline__ void scale_add_row(RegisterTile<float, 64, kCols>& x, const float* scale,
                                              const float* y) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 s = *reinterpret_cast<const float2*>(scale + fragment_col(j));
    const float2 t = *reinterpret_cast<const float2*>(y + fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x.at(j, i, 0) = x.at(j, i, 0) * s.x + t.x;
      x.at(j, i, 1) = x.at(j, i, 1) * s.y + t.y;
    }
  }
}

template <int kCols>
__device__ __forceinline__ void scale(RegisterTile<float, 64, kCols>& x, float factor) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) x.data[i] *= factor;
}

// Joins the partial results of the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace jaxkern::tile

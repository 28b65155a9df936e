// Shared-memory tiles in the 128-byte swizzle that TMA writes and wgmma reads.
//
// A tile is a sequence of panels of 128 bytes of columns: 64 elements of 16 bits, 128 of 8. A panel
// stores its rows one after another; within a row, the 16-byte chunk c lies at chunk c ^ (row % 8),
// so that eight rows of one column of chunks touch all 32 banks.
#pragma once

#include "cuda/tile/ptx/barrier.cuh"
#include "cuda/tile/ptx/matrix.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reg.cuh"

namespace jaxkern::tile {

constexpr int kPanelBytes = 128;
constexpr int kMaxSharedBytes = 227 << 10;  // that one block may have on compute capability 9.0

template <class T, int kRows_, int kCols_>
struct alignas(1024) SharedTile {
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanelCols = kPanelBytes / sizeof(T);
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelSize = kRows * kPanelBytes;  // bytes
  static constexpr int kBytes = kPanels * kPanelSize;
  static_assert(kCols % kPanelCols == 0, "columns must fill 128-byte panels");
  static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

  T data[kRows * kCols];

  // The first byte of the 16-byte chunk that holds (row, col); col is the chunk's first.
  __device__ __forceinline__ char* chunk(int row, int col) {
    const int panel = col / kPanelCols;
    const int byte = (col % kPanelCols) * static_cast<int>(sizeof(T));
    return reinterpret_cast<char*>(data) + panel * kPanelSize + row * kPanelBytes +
           (byte ^ ((row % 8) * 16));
  }
};

// The dynamic shared memory of a block as one struct. Its address is a link-time constant, so that
// addresses inside it cost no registers.
template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  static_assert(alignof(Storage) <= 1024, "1024 bytes is what the declaration below asks for");
  extern __shared__ __align__(1024) char shared_bytes[];
  return *reinterpret_cast<Storage*>(shared_bytes);
}

// The same storage, at an address that is worked out here, once. Otherwise the compiler does so
// wherever it is used, also in loops; in a cluster, the number of the block is part of it, which
// takes a special register.
template <class Storage>
__device__ __forceinline__ Storage& settled(Storage& shared) {
  const uint32_t address = __shfl_sync(0xffffffffu, ptx::shared_address(&shared), 0);
  return *static_cast<Storage*>(__cvta_shared_to_generic(address));
}

// y[row0 + r, col0 + c] = x(r, c), by one warpgroup.
template <class T, int kRows, int kTileCols, int kCols>
__device__ __forceinline__ void store(SharedTile<T, kRows, kTileCols>& y, int row0,
                                      const RegisterTile<T, 64, kCols>& x, int col0 = 0) {
  const int t = threadIdx.x % kWarpgroupSize, lane = t % kWarpSize;
  const int row = row0 + 16 * (t / kWarpSize) + lane % 16;  // matrices 0, 2: rows 0-7; 1, 3: 8-15
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    const uint32_t* r = x.data + 4 * j;
    ptx::stmatrix_x4(y.chunk(row, col0 + 16 * j + 8 * (lane / 16)), r[0], r[1], r[2], r[3]);
  }
}

// The same in float32. A warp's instruction is eight rows of 32 bytes, which the swizzle spreads
// over all banks twice: as fast as can be.
template <int kRows, int kTileCols, int kCols>
__device__ __forceinline__ void store(SharedTile<float, kRows, kTileCols>& y, int row0,
                                      const RegisterTile<float, 64, kCols>& x, int col0 = 0) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const int col = col0 + fragment_col(j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      char* chunk = y.chunk(row0 + fragment_row(i), col / 4 * 4);
      *reinterpret_cast<float2*>(chunk + col % 4 * 4) = pair(x, j, i);
    }
  }
}

// y[c, col0 + r] = x(r, c), by one warpgroup.
template <class T, int kRows, int kTileCols>
__device__ __forceinline__ void store_transposed(SharedTile<T, kRows, kTileCols>& y,
                                                 const RegisterTile<T, 64, kRows>& x,
                                                 int col0 = 0) {
  const int t = threadIdx.x % kWarpgroupSize, lane = t % kWarpSize;
  const int row = lane % 8 + 8 * (lane / 16);  // matrices 0, 1: columns 0-7 of x; 2, 3: 8-15
  const int col = col0 + 16 * (t / kWarpSize) + 8 * (lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < kRows / 16; ++j) {
    const uint32_t* r = x.data + 4 * j;
    ptx::stmatrix_x4_transposed(y.chunk(16 * j + row, col), r[0], r[1], r[2], r[3]);
  }
}

// The same in float32.
template <int kRows, int kTileCols>
__device__ __forceinline__ void store_transposed(SharedTile<float, kRows, kTileCols>& y,
                                                 const RegisterTile<float, 64, kRows>& x,
                                                 int col0 = 0) {
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = col0 + fragment_row(i);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        char* chunk = y.chunk(fragment_col(j) + c, col / 4 * 4);
        reinterpret_cast<float*>(chunk)[col % 4] = x.at(j, i, c);
      }
    }
  }
}

// x(r, c) = y[row0 + r, c], by one warpgroup.
template <class T, int kRows, int kCols>
__device__ __forceinline__ void load(RegisterTile<T, 64, kCols>& x, SharedTile<T, kRows, kCols>& y,
                                     int row0) {
  const int t = threadIdx.x % kWarpgroupSize, lane = t % kWarpSize;
  const int row = row0 + 16 * (t / kWarpSize) + lane % 16;
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    uint32_t* r = x.data + 4 * j;
    ptx::ldmatrix_x4(y.chunk(row, 16 * j + 8 * (lane / 16)), r[0], r[1], r[2], r[3]);
  }
}

// Fragment order: 16 bytes of every thread in turn, so that nobody shares a bank. Meant for data
// that is read back by load_fragments(). In global memory add_fragments() adds to it.
template <int kCols>
__device__ __forceinline__ void store_fragments(float* y, const RegisterTile<float, 64, kCols>& x) {
  float4* out = reinterpret_cast<float4*>(y) + threadIdx.x % kWarpgroupSize;
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float* d = x.data + 4 * j;
    out[j * kWarpgroupSize] = make_float4(d[0], d[1], d[2], d[3]);
  }
}

template <int kCols>
__device__ __forceinline__ void load_fragments(RegisterTile<float, 64, kCols>& x, const float* y) {
  const float4* in = reinterpret_cast<const float4*>(y) + threadIdx.x % kWarpgroupSize;
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float4 d = in[j * kWarpgroupSize];
    x.data[4 * j] = d.x;
    x.data[4 * j + 1] = d.y;
    x.data[4 * j + 2] = d.z;
    x.data[4 * j + 3] = d.w;
  }
}

// The same for 16-bit tiles.
template <class T, int kCols>
__device__ __forceinline__ void store_fragments(T* y, const RegisterTile<T, 64, kCols>& x) {
  uint4* out = reinterpret_cast<uint4*>(y) + threadIdx.x % kWarpgroupSize;
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    const uint32_t* d = x.data + 4 * j;
    out[j * kWarpgroupSize] = make_uint4(d[0], d[1], d[2], d[3]);
  }
}

template <class T, int kCols>
__device__ __forceinline__ void load_fragments(RegisterTile<T, 64, kCols>& x, const T* y) {
  const uint4* in = reinterpret_cast<const uint4*>(y) + threadIdx.x % kWarpgroupSize;
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    const uint4 d = in[j * kWarpgroupSize];
    x.data[4 * j] = d.x;
    x.data[4 * j + 1] = d.y;
    x.data[4 * j + 2] = d.z;
    x.data[4 * j + 3] = d.w;
  }
}

// y += x for y in global memory, done by the L2 cache: a warp's instruction is 512 bytes in a row.
template <int kCols>
__device__ __forceinline__ void add_fragments(float* y, const RegisterTile<float, 64, kCols>& x) {
  float* out = y + 4 * (threadIdx.x % kWarpgroupSize);
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    ptx::reduce_add_v4(out + 4 * j * kWarpgroupSize, x.data + 4 * j);
  }
}

}  // namespace jaxkern::tile

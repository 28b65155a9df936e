// Matrix products of one warpgroup: D(64 x N) (+)= A(64 x K) B(K x N), accumulated in float32.
//
// A is a register tile or a view of a shared tile, B is a view of a shared tile. A view says which
// axis of the stored tile is the reduction axis:
//   k_major<Extent>(tile, row):   rows [row, row + Extent) are M or N, columns are K
//   mn_major<Extent>(tile, col):  columns [col, col + Extent) are M or N, rows are K
// Products are asynchronous: mma() issues, mma_commit() closes a group, mma_wait<n>(tiles...)
// returns when at most n groups are pending and makes the named tiles readable.
#pragma once

#include <type_traits>

#include "cuda/tile/ptx/wgmma.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::tile {

// Reduction length of one instruction: 32 bytes.
template <class T>
constexpr int kMmaDepth = 32 / sizeof(T);

template <class Tile, int kExtent_, bool kKMajor_>
struct Operand {
  static constexpr int kExtent = kExtent_;  // along M or N
  static constexpr int kDepth = kKMajor_ ? Tile::kCols : Tile::kRows;
  static constexpr int kTransposed = kKMajor_ ? 0 : 1;
  using T = typename Tile::Element;
  static_assert(kKMajor_ || sizeof(T) == 2, "8-bit operands are K-major");
  uint32_t chunk;  // shared address of the operand's first byte, in 16 bytes

  __device__ __forceinline__ explicit Operand(uint32_t address) : chunk((address & 0x3ffff) >> 4) {}

  // The same operand of the tile `n` further on in an array of tiles.
  __device__ __forceinline__ Operand of_tile(int n) const {
    Operand other = *this;
    other.chunk += static_cast<uint32_t>(n) * (sizeof(Tile) >> 4);
    return other;
  }

  // The same so many bytes further on, a multiple of 1,024, after which swizzles repeat.
  __device__ __forceinline__ Operand of_bytes(int n) const {
    Operand other = *this;
    other.chunk += static_cast<uint32_t>(n) >> 4;
    return other;
  }

  // The same columns of the rows `n` further on in the tile, a multiple of 8.
  __device__ __forceinline__ Operand of_rows(int n) const {
    static_assert(kKMajor_, "rows are the reduction axis");
    Operand other = *this;
    other.chunk += static_cast<uint32_t>(n) * (kPanelBytes >> 4);
    return other;
  }

  // The matrix descriptor (PTX ISA, "Matrix descriptor") of the k-th instruction's operand.
  // Descriptors count in 16 bytes. Only the low word varies, so only that costs a register.
  __device__ __forceinline__ uint64_t step(int k) const {
    constexpr uint32_t kSwizzle128B = 1u << 30;
    constexpr uint32_t kEightRows = 8 * kPanelBytes >> 4;
    constexpr uint32_t kPanelStride = Tile::kPanelSize >> 4;  // read for MN-major operands only
    const int element = k * kMmaDepth<T>;
    const int panel = element / Tile::kPanelCols, col = element % Tile::kPanelCols;
    const int bytes = kKMajor_ ? panel * Tile::kPanelSize + col * static_cast<int>(sizeof(T))
                               : element * kPanelBytes;
    const uint32_t low = chunk + ((kPanelStride << 16) + (bytes >> 4));
    return (uint64_t{kSwizzle128B | kEightRows} << 32) | low;
  }
};

template <int kExtent, class T, int kRows, int kCols>
__device__ __forceinline__ auto k_major(SharedTile<T, kRows, kCols>& tile, int row = 0) {
  using Tile = SharedTile<T, kRows, kCols>;
  return Operand<Tile, kExtent, true>(ptx::shared_address(tile.data) + row * kPanelBytes);
}

// The same operand, worked out here, as settled() of shared storage is.
template <class Tile, int kExtent, bool kKMajor>
__device__ __forceinline__ auto settled(Operand<Tile, kExtent, kKMajor> x) {
  x.chunk = __shfl_sync(0xffffffffu, x.chunk, 0);
  return x;
}

template <int kExtent, class T, int kRows, int kCols>
__device__ __forceinline__ auto mn_major(SharedTile<T, kRows, kCols>& tile, int col = 0) {
  using Tile = SharedTile<T, kRows, kCols>;
  return Operand<Tile, kExtent, false>(ptx::shared_address(tile.data) +
                                       col / Tile::kPanelCols * Tile::kPanelSize);
}

// Keeps the compiler from moving uses of a tile's registers across this point.
template <int kCols>
__device__ __forceinline__ void pin(RegisterTile<float, 64, kCols>& x) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) ptx::register_fence(x.data[i]);
}

// Call after ordinary writes to accumulators or A registers and before the mma() that uses them.
template <class... Tiles>
__device__ __forceinline__ void mma_fence(Tiles&... tiles) {
  (pin(tiles), ...);
  ptx::wgmma_fence();
}

__device__ __forceinline__ void mma_commit() { ptx::wgmma_commit(); }

template <int kPending, class... Tiles>
__device__ __forceinline__ void mma_wait(Tiles&... tiles) {
  ptx::wgmma_wait<kPending>();
  (pin(tiles), ...);
}

// d = a b + (accumulate ? d : 0), A from shared memory. A and B have the same 16-bit type, or each
// an 8-bit one.
template <int kN, class TileA, bool kMajorA, class TileB, bool kMajorB>
__device__ __forceinline__ void mma(RegisterTile<float, 64, kN>& d,
                                    const Operand<TileA, 64, kMajorA>& a,
                                    const Operand<TileB, kN, kMajorB>& b, bool accumulate) {
  using A = Operand<TileA, 64, kMajorA>;
  using B = Operand<TileB, kN, kMajorB>;
  using TypeA = ElementType<typename A::T>;
  using TypeB = ElementType<typename B::T>;
  static_assert(A::kDepth == B::kDepth, "A and B must agree on the reduction length");
#pragma unroll
  for (int k = 0; k < A::kDepth / kMmaDepth<typename A::T>; ++k) {
    const bool add = accumulate || k > 0;
    if constexpr (sizeof(typename A::T) == 1) {
      ptx::Wgmma<kN>::template shared_shared<TypeA, TypeB>(d.data, a.step(k), b.step(k), add);
    } else {
      static_assert(std::is_same_v<TypeA, TypeB>);
      ptx::Wgmma<kN>::template shared_shared<TypeA, A::kTransposed, B::kTransposed>(
          d.data, a.step(k), b.step(k), add);
    }
  }
}

// d = a b + (accumulate ? d : 0), A from registers.
template <class T, int kN, int kK, class TileB, bool kMajorB>
__device__ __forceinline__ void mma(RegisterTile<float, 64, kN>& d,
                                    const RegisterTile<T, 64, kK>& a,
                                    const Operand<TileB, kN, kMajorB>& b, bool accumulate) {
  using B = Operand<TileB, kN, kMajorB>;
  static_assert(B::kDepth == kK, "A and B must agree on the reduction length");
#pragma unroll
  for (int k = 0; k < kK / kMmaDepth<T>; ++k) {
    ptx::Wgmma<kN>::template register_shared<ElementType<T>, B::kTransposed>(
        d.data, a.data + 4 * k, b.step(k), accumulate || k > 0);
  }
}

}  // namespace jaxkern::tile

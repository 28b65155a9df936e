// Moves of 8x8 16-bit matrices between registers of a warp and shared memory, and products of them.
#pragma once

#include <cstdint>

#include "cuda/tile/ptx/barrier.cuh"

namespace jaxkern::tile::ptx {

// Four matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row)), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// The same, with each matrix transposed: lane l gives the address of its column l % 8.
__device__ __forceinline__ void stmatrix_x4_transposed(void* col, uint32_t r0, uint32_t r1,
                                                       uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(col)), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// stmatrix_x4 the other way.
__device__ __forceinline__ void ldmatrix_x4(const void* row, uint32_t& r0, uint32_t& r1,
                                            uint32_t& r2, uint32_t& r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(shared_address(row))
               : "memory");
}

// A matrix transposed: lane 4 g + c has, before and after, columns 2 c and 2 c + 1 of row g.
__device__ __forceinline__ uint32_t movmatrix_transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// D(16 x 8) += A(16 x 16) B(16 x 8) of 16-bit elements, by a warp. Lane 4 g + c has, of A, columns
// 2 c, 2 c + 1 of rows g, g + 8 and then columns 2 c + 8, 2 c + 9 of both; of B, rows 2 c, 2 c + 1
// and 2 c + 8, 2 c + 9 of column g; of D, columns 2 c, 2 c + 1 of rows g and g + 8. `Type::kName`
// is the PTX element type.
template <class Type>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "C"(Type::kName));
}

}  // namespace jaxkern::tile::ptx

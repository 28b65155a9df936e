// Moves of 8x8 16-bit matrices between registers of a warp and shared memory.
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

}  // namespace jaxkern::tile::ptx

// Instructions with no C++ spelling: register budgets, fast exponential and reciprocal,
// wide reductions.
#pragma once

#include <cstdint>

namespace jaxkern::tile::ptx {

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// 2^x, relative error 2^-22; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, relative error 2^-23; +inf gives 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// global[0 .. 4) += x[0 .. 4), in no order with respect to other memory operations.
__device__ __forceinline__ void reduce_add_v4(float* global, const float* x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(global), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

// (x & mask) | bits, one instruction: of two constants the compiler would make two.
__device__ __forceinline__ uint32_t select_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// Two pairs of float16 as four of e4m3, to the nearest even, saturated; NaN stays. From cvt's
// 16-bit results in C++ the compiler would clear upper halves that are zero.
__device__ __forceinline__ uint32_t e4m3_of_f16(uint32_t low, uint32_t high) {
  uint32_t y;
  asm("{\n.reg .b16 x, z;\ncvt.rn.satfinite.e4m3x2.f16x2 x, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 z, %2;\nmov.b32 %0, {x, z};\n}"
      : "=r"(y)
      : "r"(low), "r"(high));
  return y;
}

// The compiler works this out here, not where it is used; nor does it keep what follows from it.
__device__ __forceinline__ void work_out_here(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void work_out_here(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

}  // namespace jaxkern::tile::ptx

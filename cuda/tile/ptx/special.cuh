// Instructions with no C++ spelling: register budgets, the fast exponential, an ordering hint.
#pragma once

#include "cuda/tile/ptx/barrier.cuh"

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

// Computes `x`, which is never negative, before whatever waits or touches memory next. ptxas moves
// arithmetic past a wgmma wait that it does not depend on, and the arithmetic then no longer runs
// under the product; a store that depends on `x` and never happens holds it in place.
__device__ __forceinline__ void order_before(float x) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.lt.f32 p, %0, 0f00000000;\n"
      "@p st.shared.f32 [%1], %0;\n"
      "}\n"
      :
      : "f"(x), "r"(0)
      : "memory");
}

}  // namespace jaxkern::tile::ptx

// Element types of tiles, their PTX names and packing of pairs into 32-bit registers; constants.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace jaxkern::tile {

using bf16 = __nv_bfloat16;
using f16 = __half;
using e4m3 = __nv_fp8_e4m3;
using e5m2 = __nv_fp8_e5m2;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;

// The number of the calling thread's warpgroup, in a form that the compiler knows to be the same
// for all of a warp: what it derives from it, descriptors of products above all, costs no
// registers.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupSize, 0);
}

// Registers of each thread at the launch of a block that fills an SM. All that setmaxnreg hands out
// comes from them: warpgroups that ask for more than that on average wait for ever.
constexpr int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, int b) {
  return (a + b - 1) / b;
}

template <class T>
struct ElementType;

template <>
struct ElementType<bf16> {
  static constexpr char kName[] = "bf16";
  __device__ static uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
  __device__ static float2 unpack(uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
  }
};

template <>
struct ElementType<f16> {
  static constexpr char kName[] = "f16";
  __device__ static uint32_t pack(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
  __device__ static float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
  }
};

// Of 8-bit types: four in a register.
template <__nv_fp8_interpretation_t kFormat>
struct Float8ElementType {
  __device__ static uint32_t pack(float x0, float x1, float x2, float x3) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x0, x1), __NV_SATFINITE, kFormat);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(x2, x3), __NV_SATFINITE, kFormat);
    return high << 16 | low;
  }
};

template <>
struct ElementType<e4m3> : Float8ElementType<__NV_E4M3> {
  static constexpr char kName[] = "e4m3";
};

template <>
struct ElementType<e5m2> : Float8ElementType<__NV_E5M2> {
  static constexpr char kName[] = "e5m2";
};

// Four neighbouring elements of type T in one register, rounded to nearest even; beyond the largest
// finite number they become that, NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t pack(float x0, float x1, float x2, float x3) {
  return ElementType<T>::pack(x0, x1, x2, x3);
}

// Two neighbouring elements of type T in one register, rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return ElementType<T>::pack(low, high);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return ElementType<T>::unpack(pair);
}

}  // namespace jaxkern::tile
